"""Completions of a shell after `trainer`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.command.completion import SCRIPTS, complete, script
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["+experiment=smo"], ["+experiment=smoke"]),
        (["precision=f"], ["precision=fp16", "precision=fp32"]),
        (["+experiment=smoke", "phases.prune.sp"], ["phases.prune.sparsity="]),
        (["+experiment=lenet5", "phases.prune.sp"], []),
        (["optimizer=adam", "optimizer.be"], ["optimizer.betas="]),
        (["doc"], ["doctor"]),
        (["see"], ["seed="]),
        (["seed=1", "doc"], []),
        (["--ver"], ["--version"]),
        (["--completion", ""], ["bash", "fish", "zsh"]),
        (["checkpoint.k"], ["checkpoint.keep="]),
        (["limits.min"], ["limits.min_ratio="]),
    ],
)  # fmt: skip
def test_candidates(words: list[str], found: list[str]) -> None:
    assert complete(words) == found


def test_experiments_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("# My own\nname: own\n")
    assert complete([f"--config-dir={tmp_path}", "+experiment=ow"]) == ["+experiment=own"]
    assert complete(["--config-dir", str(tmp_path), "+experiment=ow"]) == ["+experiment=own"]
    assert complete(["--config-dir", "nowhere", "+experiment=ow"]) == []
    assert complete(["--config-dir"]) == ["--config-dir"]


def test_an_unknown_shell() -> None:
    with pytest.raises(ConfigError, match="--completion=tcsh: choose one of bash, zsh, fish"):
        script("tcsh")


def test_completing_prints_a_line_for_each(capsys) -> None:
    assert main(["--complete", "precision=f"]) == 0
    assert capsys.readouterr().out == "precision=fp16\nprecision=fp32\n"


@pytest.mark.integration
def test_bash_completes_after_an_equals_sign(tmp_path: Path) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    command = tmp_path / "trainer"
    command.write_text(
        f"#!{sys.executable}\nimport sys\nfrom trainer.__main__ import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command.chmod(0o755)
    (tmp_path / "script").write_text(SCRIPTS["bash"])
    lines = ["trainer +experiment=sm", "trainer seed=1  precision=b", "trainer phases"]
    calls = "".join(
        f'COMP_LINE="{line}"; COMP_POINT={len(line)}; _trainer 2>/dev/null; '
        'echo "${COMPREPLY[*]}"\n'
        for line in lines
    )
    found = subprocess.run(
        [bash, "-c", f"source {tmp_path / 'script'}\n{calls}"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert found == ["smoke", "bf16", "phases="]
