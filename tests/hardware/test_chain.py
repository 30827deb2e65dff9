"""The experiment with AlexNet's fully connected layers, with smaller ones."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "alexnet_layers.py"


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("alexnet_layers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["alexnet_layers"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_all_executions_agree(script: Any) -> None:
    chain = script.run((90, 60, 40, 10), (0.09, 0.09, 0.25), seconds=0.01)
    assert [round(row.density, 2) for row in chain.kernels] == [0.09, 0.09, 0.25]
    assert all(row.code_bits is not None and row.code_bits <= 4 for row in chain.kernels)
    assert chain.engine_error < 1e-5
    assert chain.eie_error < 1e-5
    stages = [costs.stage for costs in chain.costs.stages]
    assert stages == ["dense", "pruned", "shared", "coded"]
    last = chain.costs.stages[-1]
    for execution in (last.cpu, last.engine, last.tpu, last.eie):
        assert execution is not None
        assert execution.microseconds.value > 0
    assert last.bytes.value < chain.costs.stages[0].bytes.value / 5
