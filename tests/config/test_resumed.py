"""A run directory names functions; resume calls only those in code that the user has chosen."""

import json
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.config.resumed import check_code
from trainer.errors import ConfigError

TARGETS = {
    "model": {"_target_": "trainer.models.LeNet5", "x": [{"_target_": "torch.nn.ReLU"}]},
    "cluster": {"working_dir": None, "py_modules": []},
}


def test_installed_packages_and_folders_of_the_user_are_fine(tmp_path, monkeypatch) -> None:
    (tmp_path / "test.py").write_text("")  # named like a module of the standard library
    (tmp_path / "mine_to_resume.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    run = tmp_path / "outputs" / "run"
    check_code(TARGETS, run, {})
    check_code({"model": {"_target_": "mine_to_resume.Net"}}, run, {})
    check_code({"model": {"_target_": "test.Net"}}, run, {})
    check_code({"model": {"_target_": "no_such_module.Net"}}, run, {})  # found when it is built
    check_code({**TARGETS, "cluster": {"working_dir": "code"}}, run, {"working_dir": "code"})


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"model": {"_target_": "os.system"}}, r"model\._target_=os\.system: .*standard library"),
        (
            {"phases": {"a": {"x": [{"_target_": "builtins.eval"}]}}},
            r"phases\.a\.x\[0\]\._target_=builtins\.eval",
        ),
        ({"cluster": {"working_dir": "code"}}, r"add cluster\.working_dir=code to the command"),
        ({"cluster": {"py_modules": ["a"]}}, r"cluster\.py_modules=\['a'\]"),
    ],
)
def test_what_is_refused(plain, message, tmp_path) -> None:
    with pytest.raises(ConfigError, match=message):
        check_code(plain, tmp_path, {})


def test_code_in_the_run_directory_is_not_imported(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "evil.py").write_text("open('was_here', 'w').close()\ndef net(): pass\n")
    config = {"name": "a", "model": {"_target_": "evil.net"}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["resume=."]) == 2
    assert "model._target_=evil.net: the module evil is in the run directory" in (
        capsys.readouterr().err
    )
    assert not Path("was_here").exists()
