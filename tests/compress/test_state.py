"""The state of a model as tensors: restored values, and refused entries."""

import copy

import pytest
import torch
from torch import nn

from trainer.compress.rewrite import restore
from trainer.compress.state import load_state, model_state
from trainer.errors import ConfigError


class Extra(nn.Linear):
    """A Linear with extra state."""

    def __init__(self, extra: object = None) -> None:
        super().__init__(2, 3)
        self.extra = extra

    def get_extra_state(self) -> object:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        self.extra = state


PLAIN = [
    None,
    True,
    3,
    -0.5,
    float("inf"),
    "\u00e9 \U0001f600",
    [],
    {},
    {"calls": 3, "seen": [1, 2.5, None, {"a": "b"}]},
]


@pytest.mark.parametrize("extra", PLAIN, ids=repr)
def test_extra_state_comes_back(extra: object) -> None:
    source, target = nn.Sequential(nn.ReLU(), Extra(extra)), nn.Sequential(nn.ReLU(), Extra("?"))
    state = model_state(source)
    assert list(state) == ["1.weight", "1.bias", "1._extra_state.json"]
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert restore(target, state) is target
    assert target[1].extra == extra
    assert type(target[1].extra) is type(extra)
    assert torch.equal(target[1].weight, source[1].weight)


def test_extra_state_that_is_a_tensor_stays_one() -> None:
    source, target = Extra(torch.arange(5, dtype=torch.uint8)), Extra()
    state = model_state(source)
    assert list(state) == ["weight", "bias", "_extra_state"]
    load_state(target, state)
    assert torch.equal(target.extra, source.extra)


@pytest.mark.parametrize(
    "extra",
    [(1, 2), {1: 2}, {1, 2}, object(), [(1,)], {"a": torch.ones(1)}, b"x"],
    ids=["tuple", "int key", "set", "object", "nested tuple", "tensor", "bytes"],
)
def test_extra_state_that_json_changes_is_refused(extra: object) -> None:
    said = rf"model: 0\._extra_state .* a {type(extra).__name__} that JSON does not keep exactly"
    with pytest.raises(ConfigError, match=said):
        model_state(nn.Sequential(Extra(extra)))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_damaged_extra_state_is_named(text: bytes) -> None:
    state = model_state(Extra(1))
    state["_extra_state.json"] = torch.frombuffer(bytearray(text or b" "), dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"_extra_state\.json is damaged"):
        load_state(Extra(), state)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_buffer_is_refused(layout: torch.layout) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("adjacency", torch.eye(2).to_sparse(layout=layout))
    name = str(layout).removeprefix("torch.")
    with pytest.raises(ConfigError, match=rf"model: adjacency is a sparse tensor \({name}\)"):
        model_state(model)
    model.register_buffer("adjacency", torch.eye(2))
    model_state(model)


def test_a_lazy_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model: 1\.weight has no shape yet"):
        model_state(nn.Sequential(nn.ReLU(), nn.LazyLinear(3)))


class Versioned(nn.Module):
    """Refuses a state_dict without its version, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def _load_from_state_dict(self, state, prefix, metadata, *rest) -> None:
        if metadata.get("version") not in (1, 2):
            raise ValueError(f"Unknown checkpoint version: {metadata.get('version')}")
        self.loaded = metadata["version"]
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_model_that_checks_its_version_is_loaded() -> None:
    source = Versioned()
    state = {name: tensor.clone() for name, tensor in model_state(source).items()}
    with pytest.raises(ValueError, match="Unknown checkpoint version"):
        Versioned().load_state_dict(state)
    target = restore(Versioned(), state)
    assert torch.equal(target.fc.weight, source.fc.weight)
    assert target.loaded == 2
    older = copy.deepcopy(source.state_dict())
    older._metadata[""]["version"] = 1
    target = restore(Versioned(), older)
    assert target.loaded == 1  # a state_dict that knows its version keeps it


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_numbers_of_another_kind_are_not_loaded(dtype: torch.dtype) -> None:
    state = model_state(nn.Linear(2, 2)) | {"weight": torch.ones(2, 2).to(dtype)}
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(RuntimeError, match=f"weight: {name} cannot become float32"):
        restore(nn.Linear(2, 2), state)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_types_of_one_kind_are_converted(dtype: torch.dtype) -> None:
    state = model_state(nn.Linear(2, 2)) | {"weight": torch.full((2, 2), 0.5, dtype=dtype)}
    model = restore(nn.Linear(2, 2), state)
    assert model.weight.dtype is torch.float32
    assert model.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]
