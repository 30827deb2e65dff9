"""python -m trainer.inference: tables, JSON, and refused arguments."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.hardware.tpu.models import quantized
from tests.inference.test_compile import sparse
from trainer import artifact
from trainer.inference.__main__ import main
from trainer.inference.latency import ENGINE, TORCH, TORCH_INT8, measure_latencies
from trainer.models import LeNet300


@pytest.fixture
def file(tmp_path: Path) -> Path:
    about = {"model": {"_target_": "trainer.models.LeNet300"}}
    path = tmp_path / "model.dcz"
    path.write_bytes(artifact.encode(sparse(LeNet300()).state_dict(), "fp32", about=about))
    return path


def test_tables(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--no-onnx", "--seconds", "0.01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Batch of 1, 1 thread, medians of ")
    engine = next(line.split() for line in lines if line.startswith(ENGINE))
    assert float(engine[1]) > 0
    assert engine[2] == "1.00"
    assert "PyTorch int8: the model is not quantized" in lines
    assert {line.split()[0] for line in lines if line} > {"fc1", "fc2", "fc3"}


def test_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = file.with_name("times.json")
    arguments = [str(file), "--no-onnx", "--seconds", "0.01", "--batch", "3", "--threads", "2"]
    assert main([*arguments, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["batch"], found["threads"]) == (3, 2)
    assert set(found["seconds"]) == {ENGINE, TORCH}
    assert [row["layer"] for row in found["layers"]] == ["fc1", "fc2", "fc3"]


def test_a_model_without_zeros_is_measured_all_the_same() -> None:
    model = nn.Sequential(nn.Linear(50, 5))
    found = measure_latencies(model, model, torch.rand(1, 50), onnx=False, seconds=0)
    assert found.layers == []
    assert set(found.missing) == {TORCH_INT8}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_layers_without_integers_stay_as_they_are() -> None:
    """Those whose padding is uneven, for instance, or whose inputs are not quantized."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"), nn.Flatten(), nn.Linear(32, 3))
    samples = torch.rand(2, 1, 4, 4)
    for activations, missing in ((8, set()), (None, {TORCH_INT8})):
        made = quantized(pickle.loads(pickle.dumps(model)), samples, activations=activations)
        found = measure_latencies(made, model, samples, onnx=False, seconds=0)
        assert set(found.missing) == missing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["there-is-none.dcz"], "no such file"),
        (["FILE", "--batch", "0"], "--batch=0: it must be above 0"),
        (["FILE", "--seconds", "-1"], "--seconds=-1"),
    ],
)
def test_refuses(
    file: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(file) if word == "FILE" else word for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_damaged_file(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_bytes(file.read_bytes()[:-3])
    assert main([str(file), "--no-onnx"]) == 1
    assert str(file) in capsys.readouterr().err
