"""Checkpoints: contents are preserved, and damage is detected."""

import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from torch import nn

from trainer.errors import ConfigError
from trainer.messages import Checkpoint
from trainer.store.checksummed import DamagedError, read_checksummed, write_checksummed
from trainer.store.serialization import check_state, pack, to_bytes, unpack


def sealed(path, content, about):
    with path.open("wb") as file:
        write_checksummed(file, content, about)
    return path


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and (a == b or a != a)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_an_optimizer_comes_back_bit_for_bit(kind):
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(()))]
    optimizer = kind(parameters, lr=0.1)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    assert equal(unpack(pack(state)), state)


values = st.none() | st.booleans() | st.integers() | st.floats() | st.text()


@given(
    st.dictionaries(
        st.text() | st.integers(),
        st.recursive(values, lambda n: st.lists(n) | st.dictionaries(st.text(), n), max_leaves=8),
        max_size=4,
    )
)
@pytest.mark.slow
def test_any_plain_state_comes_back(state):
    assert equal(unpack(pack(state)), state)


def test_what_cannot_be_kept_is_named():
    with pytest.raises(TypeError, match="/a/b: a set"):
        pack({"a": {"b": {1}}})


def test_tied_and_strided_tensors_are_an_ordinary_state_dict(tmp_path):
    weight = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    path = sealed(tmp_path / "x", to_bytes({"a": weight, "b": weight}), {})
    loaded = load_file(path)
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], weight)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int16, torch.bool]
)
def test_any_type_and_shape_is_read_by_the_library(dtype):
    """Odd sizes beside one another, and names that JSON must escape."""
    tensors = {
        name: torch.randint(2, shape).to(dtype)
        for name, shape in {"one": (), "none": (0, 3), 'a "b"\n\u00e9': (3, 5)}.items()
    }
    tensors["bytes"] = torch.arange(3, dtype=torch.uint8)
    loaded = load(to_bytes(tensors, {"x": "y"}))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(loaded[name].double(), tensor.double())


def test_numbers_that_no_file_can_hold_are_named():
    with pytest.raises(TypeError, match=r"w: torch\.complex128"):
        to_bytes({"w": torch.zeros(1, dtype=torch.complex128)})


def test_a_checkpoint_travels_beside_the_pickle_and_is_written_from_there(tmp_path):
    sent = Checkpoint(phase=1, step=2, content=pack({"w": torch.arange(6.0)}))
    buffers = []
    pickled = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1
    assert len(pickled) < len(sent.content)
    got = pickle.loads(pickled, buffers=[buffer.raw() for buffer in buffers])
    assert got == sent
    for protocol in (4, 5):
        assert pickle.loads(pickle.dumps(sent, protocol)) == sent
    assert read_checksummed(sealed(tmp_path / "x", got.content, {}))[0] == sent.content


def test_a_checksummed_file_returns_its_about(tmp_path):
    content = pack({"step": 3, "weights": torch.arange(5.0)})
    path = sealed(tmp_path / "x", content, {"phase": 1, "name": "prune"})
    read, about = read_checksummed(path)
    assert about == {"phase": 1, "name": "prune"}
    assert read == content
    assert equal(unpack(read), {"step": 3, "weights": torch.arange(5.0)})


@given(st.data())
def test_any_damage_is_found(tmp_path_factory, data):
    buffer = io.BytesIO()
    write_checksummed(buffer, pack({"w": torch.arange(6.0), "n": 1}), {"phase": 0})
    whole = bytearray(buffer.getvalue())
    if data.draw(st.booleans(), "cut"):
        damaged = bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position] ^= 1 << data.draw(st.integers(0, 7))
        damaged = bytes(whole)
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    with pytest.raises(DamagedError):
        read_checksummed(path)


def test_a_model_whose_state_cannot_be_kept_is_refused_before_it_trains():
    model = nn.Linear(2, 2)
    check_state(model)
    with torch.device("meta"):
        check_state(nn.Linear(2, 2))
    model.register_buffer("wave", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ConfigError, match="model: wave is of type complex128, which checkpoints"):
        check_state(model)
    with pytest.raises(TypeError, match="wave"):
        to_bytes(model.state_dict())
