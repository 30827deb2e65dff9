"""Initial weights: every kind of file that is read, and what is refused."""

import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load, save_file
from torch import nn

from trainer import artifact
from trainer.compress.state import load_state
from trainer.errors import ConfigError
from trainer.models import LeNet300
from trainer.store.initial import initial_weights, read_weights


@pytest.fixture
def state():
    torch.manual_seed(0)
    return LeNet300().state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_safetensors_pt_and_dcz_give_the_same_weights(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "c.pth")
    (tmp_path / "d.dcz").write_bytes(artifact.encode(state, "fp32"))
    for name in ("a.safetensors", "b.pt", "c.pth", "d.dcz"):
        assert same(read_weights(tmp_path / name), state), name
        assert same(load(initial_weights(tmp_path / name, LeNet300())), state), name


class Harmful:
    def __reduce__(self):
        return (print, ("harm",))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.safetensors", None, "cannot be read"),
        ("torn.safetensors", b"\x10\0\0\0\0\0\0\0{", "cannot be read"),
        ("torn.dcz", b"DCZ\x01\x05", "cannot be read"),
        ("harm.pt", pickle.dumps(Harmful(), protocol=2), "cannot be read"),
    ],
)
def test_files_that_are_none(name, content, said, tmp_path, capsys):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=said) as error:
        read_weights(tmp_path / name)
    assert name in str(error.value)
    assert capsys.readouterr().out == ""


def test_a_file_without_a_state_dict(tmp_path):
    torch.save({"accuracy": 0.9}, tmp_path / "odd.pt")
    with pytest.raises(ConfigError, match="state_dict is needed"):
        read_weights(tmp_path / "odd.pt")


@pytest.mark.parametrize("model", [LeNet300(), None], ids=["known", "not known here"])
def test_a_quantized_model_is_refused_as_such(tmp_path, model):
    state = {
        "fc3.weight": torch.randint(-127, 128, (10, 100)) * 0.01,
        "fc3.weight_quantizer.scale": torch.tensor(0.01),
        "fc3.weight_quantizer.width": torch.tensor(8, dtype=torch.uint8),
    }
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "a.dcz").write_bytes(artifact.encode(state))
    for name in ("a.safetensors", "a.dcz"):
        with pytest.raises(ConfigError, match=r"quantized.*weights before the quantize phase"):
            initial_weights(tmp_path / name, model)


def test_weights_of_another_model(tmp_path, state):
    path = tmp_path / "a.safetensors"
    save_file({**state, "fc1.weight": state["fc1.weight"][:10].clone()}, path)
    with pytest.raises(ConfigError, match=r"fc1\.weight is of shape \[10, 784\].*\[300, 784\]"):
        initial_weights(path, LeNet300())
    save_file({k: v for k, v in state.items() if k != "fc3.bias"}, path)
    with pytest.raises(ConfigError, match=r"fc3\.bias is missing in the file"):
        initial_weights(path, LeNet300())
    save_file({**state, "fc9.bias": torch.zeros(1)}, path)
    with pytest.raises(ConfigError, match=r"fc9\.bias .* missing in the model"):
        initial_weights(path, LeNet300())


def saved(path, **changes):
    """A state_dict of a Linear(2, 2) with a counter, some entries replaced."""
    entries = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "steps": torch.tensor(3)}
    torch.save({**entries, **changes}, path)
    return path


class Counting(nn.Linear):
    def __init__(self, dtype=torch.float32) -> None:
        super().__init__(2, 2, dtype=dtype)
        self.register_buffer("steps", torch.tensor(0))


@pytest.mark.parametrize(
    ("entry", "value", "problem"),
    [
        ("weight", torch.ones(2, 2, dtype=torch.int8), "int8 in the file and float32"),
        ("weight", torch.ones(2, 2, dtype=torch.bool), "bool in the file and float32"),
        ("weight", torch.ones(2, 2, dtype=torch.complex64), "complex64 in the file and float32"),
        ("steps", torch.tensor(1.0), "float32 in the file and int64"),
        ("steps", torch.tensor(True), "bool in the file and int64"),
    ],
    ids=["int8", "bool", "complex", "float for int", "bool for int"],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_numbers_of_another_kind_are_refused(entry, value, problem, device, tmp_path):
    path = saved(tmp_path / "a.pt", **{entry: value})
    with torch.device(device):
        model = Counting()
    with pytest.raises(ConfigError, match=f"{entry} is {problem} in the model: only numbers of"):
        initial_weights(path, model)


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float64", "float8_e4m3fn"])
def test_floating_point_weights_are_converted(name, tmp_path):
    dtype = getattr(torch, name)
    path = saved(tmp_path / "a.pt", weight=torch.full((2, 2), 0.5, dtype=dtype))
    model = Counting()
    model.load_state_dict(load(initial_weights(path, model)))
    assert model.weight.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert model.weight.dtype is torch.float32


def test_values_that_the_type_of_the_model_cannot_represent_are_refused(tmp_path):
    path = saved(tmp_path / "a.pt", weight=torch.full((2, 2), 1e5))
    initial_weights(path, Counting())
    with pytest.raises(ConfigError, match="weight is float32 in the file and float16 in the model"):
        initial_weights(path, Counting(torch.float16))
    path = saved(tmp_path / "a.pt", weight=torch.full((2, 2), 1e300, dtype=torch.float64))
    with pytest.raises(ConfigError, match="cannot represent all of its values"):
        initial_weights(path, Counting())
    path = saved(tmp_path / "b.pt", steps=torch.tensor(7, dtype=torch.uint8))
    initial_weights(path, Counting())
    model = Counting()
    model.steps = model.steps.to(torch.int8)
    path = saved(tmp_path / "b.pt", steps=torch.tensor(300))
    with pytest.raises(ConfigError, match="steps is int64 in the file and int8 in the model"):
        initial_weights(path, model)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_parameters_must_be_finite_but_buffers_need_not(value, tmp_path):
    path = saved(tmp_path / "a.pt", bias=torch.tensor([1.0, value]))
    with pytest.raises(ConfigError, match="bias holds NaN or Inf: training cannot start"):
        initial_weights(path, Counting())
    model = Counting()
    model.register_buffer("mask", torch.zeros(2))
    initial_weights(saved(tmp_path / "a.pt", mask=torch.tensor([0.0, value])), model)


def test_weights_of_another_version_of_a_class_are_refused(tmp_path):
    class Newer(nn.Linear):
        _version = 2

    state = OrderedDict(nn.Linear(2, 2).state_dict())
    state._metadata = nn.Linear(2, 2).state_dict()._metadata
    torch.save(state, tmp_path / "a.pt")
    initial_weights(tmp_path / "a.pt", nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"the model was saved by version 1 .* this is version 2"):
        initial_weights(tmp_path / "a.pt", Newer(2, 2))


class Extra(nn.Linear):
    """Has extra state, as nn.Module.get_extra_state returns it."""

    def __init__(self, extra=None) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_is_read(tmp_path):
    torch.save(Extra({"calls": 3}).state_dict(), tmp_path / "a.pt")
    weights = load(initial_weights(tmp_path / "a.pt", Extra({})))
    model = Extra()
    load_state(model, weights)
    assert model.extra == {"calls": 3}
    torch.save(Extra({3}).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"init_from=.*(a state_dict is needed|cannot be read)"):
        initial_weights(tmp_path / "a.pt", Extra())
