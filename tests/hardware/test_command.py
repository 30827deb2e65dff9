"""python -m trainer.hardware with a run directory, a file or an experiment; refused arguments."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import trainer
from tests.hardware.test_workloads import compressed
from trainer import artifact
from trainer.data.sources import as_splits
from trainer.data.split import Splits
from trainer.hardware.__main__ import _with_engine, main
from trainer.hardware.costs import CostSettings, network_costs
from trainer.library.subject import Subject
from trainer.models import LeNet300
from trainer.phases import Prune, Share, Train

INPUTS = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
DATA = (
    (INPUTS, INPUTS[:, 0, 0, 0].gt(0.5).long()),
    (INPUTS[:9], INPUTS[:9, 0, 0, 0].gt(0.5).long()),
    (INPUTS[9:], INPUTS[9:, 0, 0, 0].gt(0.5).long()),
)


@pytest.fixture(autouse=True)
def measured_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured on the CPU is executed as few times as the command ever does."""
    brief = functools.partial(CostSettings, cpu_seconds=0)
    monkeypatch.setattr("trainer.hardware.__main__.CostSettings", brief)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run: LeNet-300-100, pruned and shared."""
    return trainer.run(
        model=LeNet300(),
        data=DATA,
        phases=[Train(epochs=1), Prune(0.9), Share(bits=4)],
        cluster={"workers": 1, "backend": "inline", "threads": 1},
        artifact=True,
        progress=False,
        out=tmp_path_factory.mktemp("runs") / "first",
    ).folder


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.slow
def test_a_run_directory(
    run_dir: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    assert main([str(run_dir), "--json", str(run_dir / "costs.json")]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines[3:7]] == ["dense", "pruned", "shared", "coded"]
    size = (run_dir / "model.dcz").stat().st_size
    coded = json.loads((run_dir / "costs.json").read_text())["stages"][-1]
    assert 0 < coded["bytes"]["value"] <= size
    assert coded["bytes"]["evidence"] == "measured"
    assert coded["engine"]["microseconds"]["value"] > 0
    assert coded["engine"]["microseconds"]["evidence"] == "measured"
    assert "engine us" in lines[1]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["hardware"]["stages"][-1] == coded
    page = (run_dir / "report.html").read_text()
    assert "<h2>Hardware</h2>" in page
    assert "operations per byte of weights" in page
    # Once more: the section is replaced.
    request.getfixturevalue("charts_not_drawn")
    assert main([str(run_dir / "model.dcz"), "--batch", "2"]) == 0
    page = (run_dir / "report.html").read_text()
    assert page.count("<h2>Hardware</h2>") == 1
    assert "a batch of 2 samples" in page


@pytest.mark.slow
def test_a_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "model.dcz"
    about = {"model": {"_target_": "trainer.models.LeNet300", "classes": 10}}
    file.write_bytes(artifact.encode(compressed().state_dict(), about=about))
    assert main([str(file), "--json", "-"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert costs["stages"][0]["bytes"]["evidence"] == "assumed"
    assert "random samples of shape [1, 28, 28]" in costs["notes"][0]


@pytest.mark.parametrize(
    "about",
    [{}, {"model": 3}, {"model": {"_target_": "os.system", "command": "touch owned"}}],
)
def test_a_file_of_an_unknown_model(
    about: dict[str, Any], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    """Code that a file names is not executed."""
    monkeypatch.chdir(tmp_path)
    Path("model.dcz").write_bytes(artifact.encode(compressed().state_dict(), about=about))
    assert main(["model.dcz"]) == 2
    assert "give the run directory" in capsys.readouterr().err
    assert not Path("owned").exists()


def build(seed: int = 0) -> Splits:
    return as_splits(DATA, seed)


CONFIG = """# @package _global_
defaults:
  - /phase@phases.prune: prune
  - /phase@phases.share: share
  - /phase@phases.quantize: quantize
  - _self_
  - override /model: lenet300
  - override /data: own
name: mine
phases:
  prune: {sparsity: 0.8}
  share: {bits: 3}
  quantize: {keep: [zeros, sharing], per_channel: false}
artifact: {make: true}
"""


OWN_DATA = """_target_: tests.hardware.test_command.build
batch_size: 16
"""


@pytest.fixture
def config_dir(tmp_path: Path) -> str:
    for file, content in (("experiment/mine", CONFIG), ("data/own", OWN_DATA)):
        path = tmp_path / "conf" / f"{file}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(content)
    return f"--config-dir={tmp_path / 'conf'}"


@pytest.mark.slow
def test_an_experiment(config_dir: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Its phases are applied without training."""
    assert main(["mine", "phases.prune.sparsity=0.75", config_dir, "--json=-"]) == 0
    costs = json.loads(capsys.readouterr().out)
    names = [stage["stage"] for stage in costs["stages"]]
    assert names == ["dense", "pruned", "shared", "quantized", "coded"]
    dense, pruned = costs["stages"][:2]
    assert pruned["macs"]["value"] == pytest.approx(dense["macs"]["value"] / 4, rel=0.01)
    assert costs["stages"][-1]["tpu"]["microseconds"]["evidence"] == "assumed"
    assert "not trained" in costs["notes"][0]


@pytest.mark.slow
def test_a_file_and_its_experiment(config_dir: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "other.dcz"
    file.write_bytes(artifact.encode(compressed().state_dict()))
    assert main([str(file), "mine", config_dir, "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"][-1]["bytes"]["evidence"] == "measured"
    file.write_bytes(artifact.encode(nn.Linear(2, 3).state_dict()))
    assert main([str(file), "mine", config_dir]) == 2
    assert "not of this experiment's model" in capsys.readouterr().err


@pytest.mark.slow
def test_an_energy_table_of_ones_own(
    config_dir: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "chip.yaml"
    table.write_text(
        "multiply: {fp32: 1, int8: 1}\nadd: {fp32: 1, int32: 1}\n"
        "on_chip_word: 1\noff_chip_word: 100\n"
    )
    assert main(["mine", "~phases.quantize", config_dir, f"--energy={table}", "--json=-"]) == 0
    costs = json.loads(capsys.readouterr().out)
    assert costs["settings"]["energy_table"] == "chip"
    dense = costs["stages"][0]
    assert dense["energy"]["arithmetic"]["value"] == pytest.approx(2e-6 * dense["macs"]["value"])
    table.write_text("multiply: {fp32: 1}\nplus: 3\n")
    assert main(["mine", config_dir, f"--energy={table}"]) == 2
    assert "it needs multiply" in capsys.readouterr().err
    table.write_text("multiply: 3\nadd: {}\non_chip_word: 1\noff_chip_word: 100\n")
    assert main(["mine", config_dir, f"--energy={table}"]) == 2
    assert "it needs multiply" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["unheard_of"], "unheard_of"),
        (["some/where"], "some/where: there is no such file or run directory"),
        (["model.dcz"], "model.dcz: there is no such file or run directory"),
        (["seed=3"], "seed=3: name an experiment first"),
        (["mine", "--batch=0"], "--batch=0: it must be above 0"),
        (["mine", "--cpu-watts=-1"], "--cpu-watts=-1: it must be above 0"),
        (["mine", "--cpu-watts=0"], "--cpu-watts=0: it must be above 0"),
        (["mine", "--buffer-kib=inf"], "--buffer-kib=inf: it must be above 0 and finite"),
        (["mine", "--buffer-kib=nan"], "--buffer-kib=nan: it must be above 0 and finite"),
        (["mine", "--energy=gas"], "--energy=gas: neither a file nor one of horowitz, eie"),
        (["."], "no run directory, since it has no config.yaml"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_a_damaged_safetensors_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    for content in (b"", b"nothing of that kind", 20 * b"\0"):
        path.write_bytes(content)
        assert main([str(path)]) == 1
        assert "model.safetensors: no .safetensors file, or damaged" in capsys.readouterr().err


def test_what_cannot_be_read(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run_dir), "seed=1"]) == 2
    assert "seed=1: a run has its settings" in capsys.readouterr().err
    (run_dir / "model.dcz").write_bytes(b"DCZ and so on")
    assert main([str(run_dir)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    (run_dir / "model.dcz").unlink()
    (run_dir / "model.safetensors").unlink()
    assert main([str(run_dir)]) == 2
    assert "has not finished" in capsys.readouterr().err


def test_a_model_that_the_engine_refuses_has_its_other_costs() -> None:
    model, samples = nn.Sequential(nn.Linear(8, 4)).double(), torch.rand(1, 8).double()
    costs = network_costs(model, samples, settings=CostSettings(cpu_seconds=0))
    subject = Subject(model, model, samples, None)
    assert "engine: 0 has weights in torch.float64" in _with_engine(costs, subject).notes[-1]
