"""Initial weights: all kinds of files, and refused ones."""

import json
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
from trainer.store import initial
from trainer.store.weight_files import read_weights


def initial_weights(path, model, **options):
    """The content; values that the file lacks are those of `model`."""
    return initial.initial_weights(path, model, lambda: model, **options).content


def notices(path, model, **options):
    return initial.initial_weights(path, model, lambda: model, **options).notices


@pytest.fixture
def state():
    torch.manual_seed(0)
    return LeNet300().state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.slow
def test_safetensors_pt_and_dcz_give_the_same_weights(tmp_path, state):
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "c.pth")
    (tmp_path / "d.dcz").write_bytes(artifact.encode(state, "fp32"))
    for name in ("a.safetensors", "b.pt", "c.pth", "d.dcz"):
        assert same(read_weights(tmp_path / name)[0], state), name
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
def test_files_of_other_formats_are_refused(name, content, said, tmp_path, capsys):
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


def test_a_quantized_model_is_refused_as_such(tmp_path):
    state = {
        "fc3.weight": torch.randint(-127, 128, (10, 100)) * 0.01,
        "fc3.weight_quantizer.scale": torch.tensor(0.01),
        "fc3.weight_quantizer.width": torch.tensor(8, dtype=torch.uint8),
    }
    save_file(state, tmp_path / "a.safetensors")
    (tmp_path / "a.dcz").write_bytes(artifact.encode(state))
    for name in ("a.safetensors", "a.dcz"):
        with pytest.raises(ConfigError, match=r"quantized.*weights before the quantize phase"):
            initial_weights(tmp_path / name, LeNet300())


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


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.model.", "net."])
def test_prefixes_that_wrappers_add_are_removed(prefix, tmp_path, state):
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "a.pt")
    assert same(load(initial_weights(tmp_path / "a.pt", LeNet300())), state)
    assert prefix.rstrip(".").split(".")[0] in notices(tmp_path / "a.pt", LeNet300())[0]


def test_names_of_a_backbone_get_the_prefix_that_the_model_gives_them(tmp_path):
    backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.save(backbone.state_dict(), tmp_path / "a.pt")
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))})
    loaded = load(initial_weights(tmp_path / "a.pt", model))
    assert torch.equal(loaded["body.0.weight"], backbone[0].weight)


def test_two_models_in_one_file_are_ambiguous(tmp_path, state):
    both = {f"{one}.{name}": value for one in ("query", "key") for name, value in state.items()}
    torch.save(both, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"'query\.' removed or 'key\.' removed would fit"):
        initial_weights(tmp_path / "a.pt", LeNet300(), strict=False)
    torch.save({"ema": state, "raw": state}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match="it holds several: ema, raw"):
        initial_weights(tmp_path / "a.pt", LeNet300())


def test_nested_state_dicts_are_found_also_under_unusual_keys(tmp_path, state):
    optimizer = {"state": {0: {"momentum": torch.ones(2)}}, "param_groups": []}
    for number, content in enumerate(
        (
            {"epoch": torch.tensor(3), "model": state, "optimizer": optimizer},
            {"backbone": state, "optimizer": optimizer, "args": {"lr": 0.1}},
            {"checkpoint": {"state_dict": state}}["checkpoint"],
        )
    ):
        torch.save(content, tmp_path / f"{number}.pt")
        assert same(read_weights(tmp_path / f"{number}.pt")[0], state)


def test_folders_of_save_pretrained_and_shards(tmp_path, state):
    save_file(state, tmp_path / "model.safetensors")
    assert same(read_weights(tmp_path)[0], state)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"the folder holds none of model\.safetensors"):
        read_weights(tmp_path)
    names = list(state)
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: state[name] for name in part}, tmp_path / f"{number}.safetensors")
    index = {name: f"{int(name not in names[:2])}.safetensors" for name in names}
    content = json.dumps({"metadata": {}, "weight_map": index})
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert same(read_weights(tmp_path)[0], state)


def test_a_new_head_starts_fresh(tmp_path, state):
    torch.save(
        {**state, "fc3.weight": torch.zeros(7, 100), "fc3.bias": torch.zeros(7)}, tmp_path / "a.pt"
    )
    model = LeNet300()
    with pytest.raises(ConfigError, match=r"fc3\.weight is of shape \[7, 100\].*init_skip"):
        initial_weights(tmp_path / "a.pt", model)
    for options in ({"skip": ["fc3"]}, {"skip": ["fc3.*"]}, {"strict": False}):
        loaded = load(initial_weights(tmp_path / "a.pt", model, **options))
        assert torch.equal(loaded["fc1.weight"], state["fc1.weight"])
        assert torch.equal(loaded["fc3.weight"], model.fc3.weight)
        (line,) = notices(tmp_path / "a.pt", model, **options)
        assert line.endswith("fresh values instead: fc3.weight, fc3.bias")
    with pytest.raises(ConfigError, match="init_skip: 'head' matches no entry; there are fc1"):
        initial_weights(tmp_path / "a.pt", model, skip=["head"])
    with pytest.raises(ConfigError, match="no weight of the file fits"):
        initial_weights(
            tmp_path / "a.pt", nn.ModuleDict({"conv": nn.Conv2d(1, 1, 1)}), strict=False
        )


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_weight_may_be_in_the_file_once(tmp_path):
    model, weight = Tied(), torch.randn(5, 3)
    for name in ("embedding.weight", "head.weight"):
        save_file({name: weight}, tmp_path / "a.safetensors")
        with torch.device("meta"):
            described = Tied()
        loaded = load(initial_weights(tmp_path / "a.safetensors", described))
        assert torch.equal(loaded["embedding.weight"], weight)
        assert torch.equal(loaded["head.weight"], weight)
    save_file({"embedding.weight": weight, "head.weight": weight + 1}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="one tensor in the model, but differ in the file"):
        initial_weights(tmp_path / "a.safetensors", model)


def test_computed_buffers_may_be_missing_or_extra_but_not_running_statistics(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.register_buffer("position_ids", torch.arange(4))
    state = {**model.state_dict(), "attn.bias": torch.ones(2, 2, dtype=torch.bool)}
    state["rotary.inv_freq"] = torch.ones(2)
    del state["position_ids"], state["1.num_batches_tracked"]
    torch.save(state, tmp_path / "a.pt")
    loaded = load(initial_weights(tmp_path / "a.pt", model))
    assert loaded.keys() == model.state_dict().keys()
    missing, unused = notices(tmp_path / "a.pt", model)
    assert "position_ids" in missing
    assert "num_batches_tracked" in missing
    assert unused.endswith("not used: attn.bias, rotary.inv_freq")
    del state["1.running_var"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"1\.running_var is missing in the file"):
        initial_weights(tmp_path / "a.pt", model)
