"""A fixture for tests that export to ONNX."""

import functools

import pytest


@pytest.fixture(scope="session", autouse=True)
def exporter_reads_its_operators_once():
    """PyTorch's exporter parses the source of its 500 operators anew for each export.

    That takes half a second; the table that it makes of them is the same each time. A file of tests
    imports this fixture to use it.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    patch = pytest.MonkeyPatch()
    once = staticmethod(functools.cache(ONNXRegistry.from_torchlib))
    patch.setattr(ONNXRegistry, "from_torchlib", once)
    yield
    patch.undo()
