"""Weights to begin with: every kind of file that is taken, and what is refused."""

import pickle

import pytest
import torch
from safetensors.torch import load, save_file

from trainer import artifact
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
