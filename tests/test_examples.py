"""The examples run on few samples, and their models learn."""

import importlib.util
import json
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
import pytest
import ray

import trainer
from trainer.config.compose import conf_dir
from trainer.data.idx import mnist

ROOT = conf_dir().parent
EXAMPLES = ROOT / "examples"
PARAMETERS: dict[str, dict[str, int]] = {
    "compress_your_model": {"samples": 1500, "rounds": 1, "workers": 1},
    "read_a_report": {"images": 1500},
    "sweep": {"images": 600, "trials": 2, "workers": 1},
}
ACCURACY = {  # run directories, and what their models must reach; chance is 0.25 for signals
    "compress_your_model": {"signals": 0.8},
    "read_a_report": {"smoke": 0.6},
    "sweep": {"chosen": 0.6},
    "how_small": {"dense": 0.6, "0.5": 0.6},
    "own_phase_and_sink": {"run": 0.6},
    "resume": {"undisturbed": 0.6, "interrupted": 0.6},
}


def check_learned(name: str, folder: Path) -> None:
    for run, bound in ACCURACY[name].items():
        summary = json.loads((folder / run / "summary.json").read_text())
        assert summary["status"] == "done"
        assert summary["accuracy"] > bound, run


def test_every_example_is_here_and_on_the_page() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"execute"}
    notebooks = {path.stem for path in EXAMPLES.glob("*.ipynb")}
    assert notebooks == set(PARAMETERS)
    assert notebooks | scripts == set(ACCURACY)
    page = (ROOT / "docs" / "examples.md").read_text()
    for path in [*EXAMPLES.glob("*.ipynb"), *EXAMPLES.glob("*.py")]:
        assert f"(../examples/{path.name})" in page, path.name


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_notebook_shows_what_a_run_of_it_showed(name: str) -> None:
    path = EXAMPLES / f"{name}.ipynb"
    assert path.stat().st_size < 150_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("text/html" in output.get("data", {}) for output in outputs)
    assert not any(output.output_type == "error" for output in outputs)
    assert "/tmp/" not in path.read_text()


@pytest.mark.integration
@pytest.mark.timeout(400)  # starts a kernel
@pytest.mark.usefixtures("shared_ray")
@pytest.mark.parametrize("name", PARAMETERS)
def test_a_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    spec = importlib.util.spec_from_file_location("execute", EXAMPLES / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    notebook = module.execute(EXAMPLES / f"{name}.ipynb", tmp_path, **PARAMETERS[name])
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    check_learned(name, tmp_path / "runs")


@pytest.mark.integration
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("warm_workers", "elsewhere")
@pytest.mark.parametrize("name", sorted(set(ACCURACY) - set(PARAMETERS)))
def test_a_script_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--images", "1200", "--out", "out"])
    few = partial(mnist, validation=500, test=500)  # of which there are 15,000 otherwise
    monkeypatch.setattr(trainer.data, "mnist", few)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out
    check_learned(name, Path("out"))
