"""README and documentation are complete; their commands, settings and examples work."""

import contextlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import trainer
from trainer.__main__ import main
from trainer.config.compose import conf_dir
from trainer.data.idx import mnist
from trainer.experiment import Experiment, check_model
from trainer.testing import check_task

ROOT = conf_dir().parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMAND = re.compile(r"(?:python -m trainer|launch/local) ((?:[^`\n\\]|\\\n)+)")
PLACEHOLDER = re.compile(r"\b[A-Z]{4,}\b|\.\.\.|--config-dir|resume=|_target_")


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hooks"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def blocks(*pages: Path) -> list[str]:
    return [block for page in pages for block in PYTHON.findall(page.read_text())]


def test_readme_is_short_and_begins_like_the_site() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert blocks(ROOT / "README.md")[:1] == blocks(DOCS / "index.md")[:1]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s#]+)", page.read_text()):
        if not re.match(r"\w+:", target) and target not in ("configuration.md", "experiments.md"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_is_valid(page: Path) -> None:
    for block in blocks(page):
        compile(block, page.name, "exec")


def test_every_setting_is_documented(hooks: Any) -> None:
    files = [conf_dir() / "config.yaml", *conf_dir().glob("phase/*.yaml")]
    files += [conf_dir() / file for _, file, _ in hooks._GROUPS.values()]
    for path in files:
        _, found = hooks.settings(path)
        assert found
        explained = {setting.key for setting in found if setting.meaning}
        for setting in found:
            assert {setting.key, setting.key.rpartition(".")[0]} & explained, (path, setting)
    page = hooks.configuration()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["+experiment=smoke", "--cfg"]) == 0
    for section, value in yaml.safe_load(out.getvalue()).items():
        for key in value if isinstance(value, dict) else [None]:
            name = section if key is None else f"{section}.{key}"
            shown = section in ("model", "phases", "logger") or key == "_target_"
            assert shown or f"`{name}`" in page, name


def test_every_experiment_is_listed(hooks: Any) -> None:
    page = hooks.experiments()
    for path in conf_dir().glob("experiment/*.yaml"):
        assert re.search(rf"\| `{path.stem}` \| \w", page), path


def test_comments_may_continue_and_sections_may_nest(hooks: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(
        "# @package _global_\n# What it\n# does\ndefaults:\n  - a: b\n_target_: x.Y\n"
        "one: 1  # first\n        # and more\ntwo:  # section\n  three: [*]  # a | b\nfour: null\n"
    )
    head, found = hooks.settings(path)
    assert head == "What it does"
    assert [(s.key, s.default, s.meaning) for s in found] == [
        ("one", "1", "first and more"),
        ("two", "", "section"),
        ("two.three", "[*]", "a | b"),
        ("four", "null", ""),
    ]
    assert r"| `p.two.three` | `[*]` | a \| b |" in list(hooks.table(found, "p."))


def test_links_out_of_the_site_become_paths(hooks: Any) -> None:
    text = "[../a/b.py](x) [a/b.py](../a/b.py), [the file](../a/b.py), [page](c.md)"
    assert (
        hooks.on_page_markdown(text) == "[../a/b.py](x) `a/b.py`, the file (`a/b.py`), [page](c.md)"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.slow
def test_commands_are_accepted(page: Path, elsewhere: None) -> None:
    """Those that need files of the reader are tested with them in test_docs.py."""
    for command in set(COMMAND.findall(page.read_text())):
        if PLACEHOLDER.search(command):
            continue
        quoted = command.count("'") % 2  # the command is an argument of another one
        text = command.replace("\\\n", " ").removesuffix("'" * quoted)
        arguments = shlex.split(text, comments=True)
        if not any("=" in argument for argument in arguments):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main([*arguments, *["--cfg"] * ("--cfg" not in arguments)]) == 0, command
        check_model(Experiment.from_config(yaml.safe_load(out.getvalue())))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("pages", "learnt"),
    [
        ("index.md resume.md run-directory.md inference.md", {}),
        ("tutorial.md", {"dense": 0.6, "pruned": 0.6, "int8": 0.6, "own": 0.9}),
        ("command.md onnx.md", {}),
        ("loggers.md notebooks.md", {}),
    ],
)
@pytest.mark.usefixtures("warm_workers")
def test_examples_run(
    pages: str, learnt: dict[str, float], elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the pages, on few samples; `learnt`: accuracies that results must reach."""
    few = {"train": 640, "validation": 64, "test": 64}
    monkeypatch.setattr(trainer.data, "mnist", lambda: mnist(**few))
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(*(DOCS / page for page in pages.split())):
        code = block.replace('"max_accuracy_drop": 0.01, ', "")  # 640 samples do not reach it
        code = code.replace("trials=8", "trials=2")
        exec(compile(code, pages, "exec"), names)
    for name, accuracy in learnt.items():
        assert names[name].metrics["accuracy"] > accuracy, name


def test_examples_of_a_task_run(elsewhere: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)  # the examples draw their data and weights at random
    run, whole, several, task, check = blocks(DOCS / "own-task.md")
    Path("quantile.py").write_text(task)
    monkeypatch.syspath_prepend(Path.cwd())
    names: dict[str, Any] = {"__name__": "__main__"}
    results = []
    for block in (run, whole, several, check):
        exec(compile(block, "own-task.md", "exec"), names)
        results.append(names["result"].metrics)
    assert results[0]["mae"] < 0.3
    assert results[1]["loss"] < 190  # 206 if every pixel has its mean
    pairs, same = (torch.rand(8, 16), torch.rand(8, 16)), (torch.rand(8) > 0.5).float()
    check_task(names["task"], names["Siamese"](), pairs, same)


@pytest.mark.integration
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for page in ("api", "configuration", "experiments", "tutorial"):
        assert (tmp_path / "site" / page / "index.html").stat().st_size > 5000
