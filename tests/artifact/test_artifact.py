"""Files of the format .dcz: decoded values, and refused damaged or forged files."""

import random
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from trainer import artifact
from trainer.artifact import read, tensors
from trainer.artifact.container import HEADER_LIMIT, MAGIC, join, split
from trainer.compress.codebooks import cluster
from trainer.compress.coding import encode_floats, encode_layer, varint
from trainer.compress.trellis import round_paths


def pruned(*shape: int, density: float = 0.1) -> Tensor:
    weights = torch.randn(*shape)
    return weights * (torch.rand(*shape) < density)


def shared(*shape: int, density: float = 0.1, k: int = 8) -> Tensor:
    book = cluster(pruned(*shape, density=density), k)
    return torch.cat((torch.zeros(1), book.values))[book.codes]


@pytest.fixture
def model() -> dict[str, Tensor]:
    """A bit of everything; the values fit fp16, so that the file is exact either way."""
    torch.manual_seed(0)
    tied = shared(12, 20, density=0.5)
    half = torch.randn(6).half().float()
    return {
        "conv.weight": shared(6, 3, 3, 3, density=0.4).half().float(),
        "conv.bias": half,
        "fc.weight": shared(20, 30).half().float(),
        "pruned.weight": pruned(20, 30),
        "dense.weight": torch.randn(7, 5),
        "norm.running_mean": torch.randn(6).half().float(),
        "norm.num_batches_tracked": torch.tensor(117),
        "encoder.weight": tied.half().float(),
        "decoder.weight": tied.half().float(),
        "mask": torch.rand(4, 5) < 0.5,
        "steps": torch.arange(-3, 4, dtype=torch.int32),
        "trellis.weight": round_paths(torch.randn(12, 7) * 2, 0.0) * 0.25,
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The same names in the same order, types, shapes and bits."""
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name]) == bits(tensor), name


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())


ODD = {
    "a scalar": torch.tensor(2.5),
    "an integer": torch.tensor(7),
    "nothing": torch.empty(0),
    "no rows": torch.empty(0, 5),
    "no columns": torch.empty(5, 0, 3),
    "all zero": torch.zeros(8, 9),
    "one value": torch.full((8, 9), -1.5),
    "zero bias": torch.zeros(9),
    "minus zero": torch.tensor([[0.0, -0.0, 1.0], [-0.0, 0.0, 2.0]]),
    "minus zero of a sparse one": pruned(30, 30).index_fill(0, torch.tensor([4]), -0.0),
    "minus zero of a bias": torch.tensor([0.0, -0.0, 1.0]),
    "infinite": torch.tensor([[0.0, torch.inf], [-torch.inf, 1.0]]),
    "no number": torch.tensor([1.0, torch.nan, 3.0]),
    "too large for fp16": torch.tensor([1e6, 1.0 / 3]),
    "tiny": torch.tensor([[1e-42, 0.0], [0.0, 0.0]]).repeat(4, 4) * torch.tensor(3.0),
    "half": torch.randn(5, 6).half(),
    "brain": torch.randn(5, 6).bfloat16() * (torch.rand(5, 6) < 0.3),
    "double": torch.randn(4, 3).double(),
    "bool": torch.tensor([True, False, True]),
    "bytes": torch.arange(256).to(torch.uint8),
    "int8": torch.arange(-128, 128).to(torch.int8),
    "int16": torch.tensor([-(2**15), 2**15 - 1], dtype=torch.int16),
    "int64": torch.tensor([-(2**63), 2**63 - 1]),
    "not contiguous": torch.randn(6, 4).t(),
    "five dimensions": pruned(2, 3, 4, 5, 6),
    "full and few": shared(40, 40, density=1.0),
    "many clusters": shared(40, 40, density=1.0, k=700),
}


@pytest.mark.parametrize("name", ODD)
def test_with_fp32_numbers_every_bit_comes_back(name: str) -> None:
    same(artifact.loads(artifact.encode({name: ODD[name]}, "fp32")), {name: ODD[name]})


@pytest.mark.parametrize("coder", ["auto", "context", "columns", "huffman", "ans"])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_whole_model_comes_back(model: dict[str, Tensor], coder: str, dtype: str) -> None:
    same(artifact.loads(artifact.encode(model, dtype, coder)), model)


def test_a_file_without_tensors() -> None:
    assert artifact.loads(artifact.encode({})) == {}


def test_a_time_limit_costs_bytes_and_nothing_else() -> None:
    torch.manual_seed(0)
    rows = torch.rand(30, 1) < 0.3  # whole outputs are pruned, which only the context coder uses
    weights = {f"fc{i}": shared(30, 40, density=1.0) * rows for i in range(3)}
    whole, none = artifact.encode(weights), artifact.encode(weights, max_seconds=0)
    assert artifact.encode(weights, max_seconds=1e6) == whole
    assert len(none) > len(whole)
    same(artifact.loads(none), artifact.loads(whole))


def test_fp16_rounds_codebooks_biases_and_norms_alone() -> None:
    torch.manual_seed(1)
    weights = {
        "shared": shared(20, 20),
        "pruned": pruned(20, 20),
        "dense": torch.randn(20, 20),
        "bias": torch.randn(20),
        "large": torch.randn(20) * 1e6,
        "double": torch.randn(20).double(),
    }
    rounded = {**weights, "shared": weights["shared"].half().float()}
    rounded["bias"] = weights["bias"].half().float()
    content = artifact.encode(weights)
    same(artifact.loads(content), rounded)
    same(artifact.loads(artifact.encode(artifact.loads(content))), rounded)
    assert len(content) < len(artifact.encode(weights, "fp32"))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.floats(0, 1),
    st.integers(1, 9),
    st.integers(0, 999),
)
@pytest.mark.slow
def test_any_shape_and_density(shape: list[int], density: float, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    weights = {"a": shared(*shape, density=density, k=k), "b": pruned(*shape, density=density)}
    same(artifact.loads(artifact.encode(weights, "fp32")), weights)


def test_equal_tensors_are_stored_once_and_come_back_apart(model: dict[str, Tensor]) -> None:
    content = artifact.encode(model)
    alone = artifact.encode({k: v for k, v in model.items() if k != "decoder.weight"})
    assert len(content) - len(alone) < 40
    found = artifact.loads(content)
    memory = {t.untyped_storage().data_ptr() for t in found.values()}
    assert len(memory) == len(found)
    save(found)  # refuses tensors that share memory
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    state = artifact.loads(
        artifact.encode({k: torch.ones_like(v) for k, v in net.state_dict().items()})
    )
    net.load_state_dict(state, assign=True)
    assert net[0].weight is not net[1].weight


def test_numbers_of_a_quantizer_are_no_alias_of_rounded_ones() -> None:
    """A bias may equal a scale in its bits, and is rounded nevertheless."""
    scale = torch.tensor([1 / 3, 1 / 7])
    weights = {"a.bias": scale, "w_quantizer.scale": scale.clone()}
    found = artifact.loads(artifact.encode(weights))
    assert torch.equal(found["a.bias"], scale.half().float())
    assert torch.equal(found["w_quantizer.scale"], scale)


def test_tensors_that_only_look_like_scales() -> None:
    torch.manual_seed(0)
    for scale in (torch.ones(3), torch.ones(4, 1), torch.ones(4).half(), torch.zeros(4)):
        weights = {"w": torch.randn(4, 3), "w_quantizer.scale": scale}
        same(artifact.loads(artifact.encode(weights)), weights)


def test_a_sparse_layer_of_few_values_is_shared_where_that_is_smaller() -> None:
    """60 survivors in 32 clusters: 2 bytes a value and 5 bits each, not 4 bytes each."""
    torch.manual_seed(0)
    values = torch.randn(32).half().float()
    weight = torch.zeros(600)
    weight[torch.randperm(600)[:60]] = values[torch.arange(60) % 32]
    weights = {"w": weight.view(20, 30)}
    for dtype in ("fp16", "fp32"):
        content = artifact.encode(weights, dtype)
        same(artifact.loads(content), weights)
        assert artifact.describe(content).layers[0]["kind"] == "shared"
    assert len(artifact.encode(weights)) < len(artifact.encode({"w": pruned(20, 30)})) - 60
    # Of 59 values in fp32, a codebook would take as much, and indices besides.
    weights["w"][weights["w"] != 0] = torch.randn(59)[torch.arange(60) % 59]
    assert artifact.describe(artifact.encode(weights, "fp32")).layers[0]["kind"] == "pruned"


def test_what_the_format_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match=r"phase: a torch\.complex64 tensor cannot be written"):
        artifact.encode({"phase": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="the header takes"):
        artifact.encode({}, about={"text": "x" * HEADER_LIMIT})


@pytest.mark.parametrize(
    ("entry", "error", "said"),
    [
        (torch.empty(2, dtype=torch.uint16, device="meta"), TypeError, r"torch\.uint16 .* float32"),
        (torch.empty(2, dtype=torch.float8_e4m3fn, device="meta"), TypeError, "float8"),
        (torch.empty((1,) * 17, device="meta"), ValueError, "17 dimensions .* only 16"),
        (torch.empty(1 << 24, 1 << 24, device="meta"), ValueError, "281474976710656 elements"),
        ({"step": 3}, TypeError, "dict cannot be written"),
    ],
)
def test_a_state_dict_is_checked_without_its_values(entry, error, said) -> None:
    artifact.check({"weight": torch.empty((1,) * 16, device="meta")})
    with pytest.raises(error, match=f"^extra: .*{said}"):
        artifact.check({"weight": torch.empty(3), "extra": entry})
    with pytest.raises(error, match=r"^extra: "):
        artifact.encode({"extra": entry})


def test_too_many_names_are_found_out_beforehand() -> None:
    one = torch.empty(0)
    with pytest.raises(ValueError, match="the header takes"):
        artifact.check({f"{i}{'x' * 1000}": one for i in range(HEADER_LIMIT // 1000)})


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_integers_times_a_step_take_a_step_and_not_a_codebook(stored) -> None:
    step = torch.tensor(0.0371, dtype=stored).float()
    integers = (torch.randn(40, 30) * 2).round() * (torch.rand(40, 30) < 0.3)
    weight = integers * step + 0.0  # no minus zero
    content = artifact.encode({"w": weight})
    assert torch.equal(artifact.loads(content)["w"], weight) == (stored is torch.float16)
    (layer,) = artifact.describe(content).layers
    if stored is torch.float16:
        assert content[3] == 2
        assert (layer["kind"], layer["nonzero"]) == ("uniform", int(weight.count_nonzero()))
        assert layer["distinct"] == int(integers.max() - integers.min())


@pytest.mark.parametrize("coder", ["auto", "context", "columns", "huffman", "ans"])
def test_paths_of_a_trellis_take_levels_of_the_coarse_grid(coder: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(60, 5, 2, 2)
    weight[0, 0, 0, 0] = 40.0  # few values, far apart
    weight = round_paths(weight / 0.25, 0.1) * 0.25
    content = artifact.encode({"w": weight, "b": torch.zeros(4)}, coder=coder)
    assert content[3] == 3
    same(artifact.loads(content), {"w": weight, "b": torch.zeros(4)})
    layer = artifact.describe(content).layers[0]
    assert layer["kind"] == "trellis"
    assert layer["distinct"] < weight.max() / 0.25 + 20  # half of the multiples of half a step


@pytest.mark.parametrize("kind", ["u", "t"])
def test_a_grid_of_no_dimensions_keeps_its_shape(kind: str) -> None:
    layer = encode_layer(torch.tensor(1).numpy(), (), 1, 0, "context")
    header = {"tensors": [["w", "f32", [], kind, 0, 1, "f32"]]}
    content = join(header, [layer, encode_floats(b"\0\0\x80?", 4)])
    assert artifact.loads(content)["w"].shape == ()


def test_values_off_a_grid_keep_their_codebook_and_the_first_version() -> None:
    values = torch.tensor([0.0, -0.5, 0.25, 0.75, 100.25])
    for weight in (values[torch.randint(0, 5, (30, 9))], values[torch.randint(0, 3, (30, 9))]):
        content = artifact.encode({"w": weight})
        assert content[3] == 1
        assert artifact.describe(content).layers[0]["kind"] == "shared"
        assert torch.equal(artifact.loads(content)["w"], weight)


def test_describe(model: dict[str, Tensor]) -> None:
    about = {"name": "x", "model": {"_target_": "Net"}, "accuracy": 0.5}
    content = artifact.encode(model, about=about)
    found = artifact.describe(content)
    assert found.about == about
    # Floating tensors but the running mean, and what is tied once.
    assert found.parameters == 162 + 6 + 600 + 600 + 35 + 240 + 84
    layers = {layer["name"]: layer for layer in found.layers}
    assert list(layers) == list(model)
    for name, tensor in model.items():
        assert layers[name]["shape"] == list(tensor.shape)
        assert layers[name]["weights"] == tensor.numel()
        assert layers[name]["nonzero"] == int(tensor.count_nonzero())
        if layers[name]["kind"] == "shared":
            assert layers[name]["distinct"] == len(tensor[tensor != 0].unique())
        elif layers[name]["kind"] in ("plain", "pruned"):
            assert layers[name]["distinct"] is None
    kinds = {name: (layer["kind"], layer["bits"]) for name, layer in layers.items()}
    assert kinds["fc.weight"] == ("shared", 3)
    assert kinds["conv.bias"] == ("plain", 16)
    assert kinds["pruned.weight"] == ("pruned", 32)
    assert kinds["dense.weight"] == ("plain", 32)
    assert kinds["norm.num_batches_tracked"] == ("plain", 64)
    assert kinds["mask"] == ("plain", 8)
    assert kinds["trellis.weight"][0] == "trellis"
    assert kinds["decoder.weight"] == ("= encoder.weight", 32)
    assert layers["decoder.weight"]["bytes"] == 0
    assert sum(layer["bytes"] for layer in found.layers) + found.frame == len(content)
    assert 0 < found.frame < 600


# --- damage ---


def refused(content: bytes) -> None:
    for reading in (artifact.loads, artifact.describe):
        with pytest.raises(artifact.ArtifactError):
            reading(content)


def frames(content: bytes) -> list[bytes]:
    """The sections of a file with their lengths and checksums."""
    found, place = [], len(MAGIC)
    header, sections = split(content)
    sizes = [len(s) for s in sections]
    rest = sum(len(varint.encode(n)) + n + 4 for n in sizes)
    found.append(content[place : len(content) - rest])
    place = len(content) - rest
    for n in sizes:
        found.append(content[place : place + len(varint.encode(n)) + n + 4])
        place += len(found[-1])
    assert header
    assert MAGIC + b"".join(found) == content
    return found


def test_every_truncation_is_refused(model: dict[str, Tensor]) -> None:
    content = artifact.encode(model)
    for length in range(len(content)):
        with pytest.raises(artifact.ArtifactError):
            artifact.loads(content[:length])


def test_every_flipped_bit_of_a_small_file_is_refused() -> None:
    torch.manual_seed(0)
    content = artifact.encode({"weight": shared(6, 8, density=0.5), "bias": torch.randn(6)})
    for place in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[place >> 3] ^= 1 << (place & 7)
        with pytest.raises(artifact.ArtifactError):
            artifact.loads(bytes(damaged))


def test_thousands_of_mutations_are_refused(model: dict[str, Tensor]) -> None:
    content = artifact.encode(model)
    draw = random.Random(0)

    def flip(b: bytearray) -> None:
        for _ in range(draw.randint(1, 5)):
            b[draw.randrange(len(b))] ^= 1 << draw.randrange(8)

    def overwrite(b: bytearray) -> None:
        place, length = draw.randrange(len(b)), draw.randint(1, 40)
        b[place : place + length] = draw.randbytes(min(length, len(b) - place))

    def insert(b: bytearray) -> None:
        place = draw.randrange(len(b) + 1)
        b[place:place] = draw.choice([b"\0", b"\xff", draw.randbytes(draw.randint(1, 40))])

    def delete(b: bytearray) -> None:
        place = draw.randrange(len(b))
        del b[place : place + draw.randint(1, 40)]

    def repeat(b: bytearray) -> None:
        place, length = draw.randrange(len(b)), draw.randint(1, 400)
        b[place:place] = b[place : place + length]

    def shuffle(b: bytearray) -> None:
        cuts = sorted(draw.sample(range(len(b)), 3))
        b[:] = b[: cuts[0]] + b[cuts[1] : cuts[2]] + b[cuts[0] : cuts[1]] + b[cuts[2] :]

    tried = 0
    for _ in range(1000):
        for change in (flip, overwrite, insert, delete, repeat, shuffle):
            damaged = bytearray(content)
            change(damaged)
            if bytes(damaged) == content:
                continue
            tried += 1
            with pytest.raises(artifact.ArtifactError):
                artifact.loads(bytes(damaged))
    assert tried > 5900


def test_sections_cannot_change_places() -> None:
    """Not even those of two layers that are alike, each with its checksum."""
    torch.manual_seed(0)
    content = artifact.encode({f"fc{i}": shared(20, 20) for i in range(3)})
    head, *sections = frames(content)
    assert len(sections) == 4
    refused(MAGIC + b"".join([head, sections[1], sections[0], *sections[2:]]))
    refused(MAGIC + b"".join([*sections, head]))
    refused(MAGIC + b"".join([head, *sections, sections[-1]]))
    refused(MAGIC + b"".join([head, *sections[1:]]))
    other = frames(artifact.encode({f"fc{i}": shared(20, 20) for i in range(3)}, about={"x": 1}))
    assert len(other) == 5
    assert other[0] != head
    refused(MAGIC + b"".join([head, *other[1:]]))


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    refused(noise)
    refused(MAGIC + noise)


def test_another_version_is_named() -> None:
    with pytest.raises(artifact.ArtifactError, match="version 04"):
        artifact.loads(b"DCZ\x04" + artifact.encode({})[4:])
    with pytest.raises(artifact.ArtifactError, match="does not begin with DCZ"):
        artifact.loads(b"PK\x03\x04")


# --- made up: all checksums are right ---

FLOATS = b"\0" + b"\0\0\x80?" * 4  # four ones, stored as they are
LAYER = encode_layer(torch.tensor([[1, 0], [2, 0]]).numpy(), (2, 2), 2, 0, "huffman")
LONG = "x" * 100_000
HOSTILE = {
    "no tensors": ({}, []),
    "tensors are a mapping": ({"tensors": {}}, []),
    "about is a list": ({"tensors": [], "about": []}, []),
    "a row is a number": ({"tensors": [7]}, []),
    "a row is null": ({"tensors": [None]}, []),
    "a row is text": ({"tensors": ["weight"]}, []),
    "a row is empty": ({"tensors": [[]]}, []),
    "a row is short": ({"tensors": [["w", "f32", [4]]]}, [FLOATS]),
    "a row is long": ({"tensors": [["w", "f32", [4], "r", "f32", 1, 2]]}, [FLOATS]),
    "a name is a number": ({"tensors": [[1, "f32", [4], "r", "f32"]]}, [FLOATS]),
    "a name is very long": ({"tensors": [[LONG, "f9", [4], "r", "f32"]]}, [FLOATS]),
    "an unknown kind": ({"tensors": [["w", "f32", [4], "z", "f32"]]}, [FLOATS]),
    "an unknown type": ({"tensors": [["w", "f8", [4], "r", "f32"]]}, [FLOATS]),
    "an unknown stored type": ({"tensors": [["w", "f32", [4], "r", "x"]]}, [FLOATS]),
    "a shape is a number": ({"tensors": [["w", "f32", 4, "r", "f32"]]}, [FLOATS]),
    "a side is negative": ({"tensors": [["w", "f32", [-4], "r", "f32"]]}, [FLOATS]),
    "two sides are negative": ({"tensors": [["w", "f32", [-2, -2], "r", "f32"]]}, [FLOATS]),
    "a side is a fraction": ({"tensors": [["w", "f32", [4.0], "r", "f32"]]}, [FLOATS]),
    "a side is true": ({"tensors": [["w", "f32", [4, True], "r", "f32"]]}, [FLOATS]),
    "a side is text": ({"tensors": [["w", "f32", ["4"], "r", "f32"]]}, [FLOATS]),
    "a side is enormous": ({"tensors": [["w", "f32", [10**30], "r", "f32"]]}, [FLOATS]),
    "too many values": ({"tensors": [["w", "f32", [5], "r", "f32"]]}, [FLOATS]),
    "too few values": ({"tensors": [["w", "f32", [3], "r", "f32"]]}, [FLOATS]),
    "terabytes": ({"tensors": [["w", "f32", [1 << 40], "r", "f32"]]}, [FLOATS]),
    "terabytes in sum": (
        {"tensors": [[f"w{i}", "f32", [1 << 30], "r", "f32"] for i in range(99)]},
        [FLOATS],
    ),
    "gigabytes": ({"tensors": [["w", "f32", [1 << 33], "r", "f32"]]}, [FLOATS]),
    "gigabytes of coded numbers": (
        {"tensors": [["w", "f32", [1 << 33], "r", "f32"]]},
        [b"\x01\x07"],
    ),
    "too many sides": ({"tensors": [["w", "f32", [1] * 999, "r", "f32"]]}, [FLOATS]),
    "a million sides": ({"tensors": [["w", "f32", [9] * 1_000_000, "r", "f32"]]}, [FLOATS]),
    "a count is false": (
        {"tensors": [["w", "f32", [2, 2], "c", False, "f32"]]},
        [LAYER, encode_floats(b"", 4)],
    ),
    "empty but wide": (
        {"tensors": [["w", "f32", [0, 1 << 47, 1 << 47], "r", "f32"]]},
        [encode_floats(b"", 4)],
    ),
    "empty, wide and coded": (
        {"tensors": [["w", "f32", [0, 1 << 47], "c", 0, "f32"]]},
        [b"\x02\x00\x00", encode_floats(b"", 4)],
    ),
    "a coded layer of gigabytes": (
        {"tensors": [["w", "f32", [1 << 16, 1 << 16], "c", 2, "f32"]]},
        [LAYER, encode_floats(b"\0" * 8, 4)],
    ),
    "a codebook of bf16": (
        {"tensors": [["w", "bf16", [2, 2], "c", 2, "bf16"]]},
        [LAYER, encode_floats(b"\0" * 4, 2)],
    ),
    "a codebook longer than the weight": (
        {"tensors": [["w", "f32", [1, 1], "c", 2, "f32"]]},
        [LAYER, encode_floats(b"\0" * 8, 4)],
    ),
    "a codebook shorter than the indices": (
        {"tensors": [["w", "f32", [2, 2], "c", 1, "f32"]]},
        [LAYER, encode_floats(b"\0" * 4, 4)],
    ),
    "a grid without integers": (
        {"tensors": [["w", "f32", [2, 2], "u", 0, 0, "f32"]]},
        [LAYER, encode_floats(b"\0\0\x80?", 4)],
    ),
    "a grid below zero by a negative number": (
        {"tensors": [["w", "f32", [2, 2], "u", -1, 3, "f32"]]},
        [LAYER, encode_floats(b"\0\0\x80?", 4)],
    ),
    "a grid of too many integers": (
        {"tensors": [["w", "f32", [2, 2], "u", 0, 1 << 16, "f32"]]},
        [LAYER, encode_floats(b"\0\0\x80?", 4)],
    ),
    "a grid of fewer integers than are used": (
        {"tensors": [["w", "f32", [2, 2], "u", 0, 1, "f32"]]},
        [LAYER, encode_floats(b"\0\0\x80?", 4)],
    ),
    "a grid with a step of zero": (
        {"tensors": [["w", "f32", [2, 2], "u", 0, 2, "f32"]]},
        [LAYER, encode_floats(b"\0" * 4, 4)],
    ),
    "a grid with a step of NaN": (
        {"tensors": [["w", "f32", [2, 2], "u", 0, 2, "f16"]]},
        [LAYER, encode_floats(b"\0\x7e", 2)],
    ),
    "a grid with a step of integers": (
        {"tensors": [["w", "f32", [2, 2], "u", 0, 2, "i32"]]},
        [LAYER, encode_floats(b"\1\0\0\0", 4)],
    ),
    "a trellis without levels": (
        {"tensors": [["w", "f32", [2, 2], "t", 0, 0, "f32"]]},
        [LAYER, encode_floats(b"\0\0\x80?", 4)],
    ),
    "a trellis of fewer levels than are used": (
        {"tensors": [["w", "f32", [2, 2], "t", 0, 1, "f32"]]},
        [LAYER, encode_floats(b"\0\0\x80?", 4)],
    ),
    "a trellis with a step of NaN": (
        {"tensors": [["w", "f32", [2, 2], "t", 0, 2, "f16"]]},
        [LAYER, encode_floats(b"\0\x7e", 2)],
    ),
    "a trellis of gigabytes": (
        {"tensors": [["w", "f32", [1 << 16, 1 << 16], "t", 0, 2, "f32"]]},
        [LAYER, encode_floats(b"\0\0\x80?", 4)],
    ),
    "a grid of bf16": (
        {"tensors": [["w", "bf16", [2, 2], "u", 0, 2, "bf16"]]},
        [LAYER, encode_floats(b"\x80?", 2)],
    ),
    "a codebook of too many": (
        {"tensors": [["w", "f32", [1 << 9, 1 << 9], "c", 1 << 16, "f32"]]},
        [LAYER, encode_floats(b"\0" * (4 << 16), 4)],
    ),
    "integers without scales": (
        {"tensors": [["w", "f32", [2, 2], "q", 2, "i8"]]},
        [LAYER, encode_floats(b"\xff\x01", 1)],
    ),
    "integers with scales that do not fit": (
        {
            "tensors": [
                ["w", "f32", [2, 2], "q", 2, "i8"],
                ["w_quantizer.scale", "f32", [4], "r", "f32"],
            ]
        },
        [LAYER, FLOATS, encode_floats(b"\xff\x01", 1)],
    ),
    "integers with scales of integers": (
        {
            "tensors": [
                ["w", "f32", [2, 2], "q", 2, "i8"],
                ["w_quantizer.scale", "i8", [2], "r", "i8"],
            ]
        },
        [LAYER, encode_floats(b"\xff\x01\x01\x01", 1)],
    ),
    "integers stored as floats": (
        {
            "tensors": [
                ["w", "f32", [2, 2], "q", 2, "f32"],
                ["w_quantizer.scale", "f32", [2], "r", "f32"],
            ]
        },
        [LAYER, FLOATS],
    ),
    "a count is true": (
        {"tensors": [["w", "f32", [2, 2], "c", True, "f32"]]},
        [LAYER, encode_floats(b"\0" * 4, 4)],
    ),
    "a count is negative": (
        {"tensors": [["w", "f32", [2, 2], "c", -2, "f32"]]},
        [LAYER, encode_floats(b"", 4)],
    ),
    "more positions than values": (
        {"tensors": [["w", "f32", [2, 2], "m", 1, "f32"]]},
        [
            encode_layer(torch.tensor([[1, 0], [1, 0]]).numpy(), (2, 2), 1, 0),
            encode_floats(b"\0" * 4, 4),
        ],
    ),
    "an unknown coder": (
        {"tensors": [["w", "f32", [2, 2], "c", 2, "f32"]]},
        [b"\x09" + LAYER[1:], encode_floats(b"\0" * 8, 4)],
    ),
    "an empty layer": (
        {"tensors": [["w", "f32", [2, 2], "c", 2, "f32"]]},
        [b"", encode_floats(b"\0" * 8, 4)],
    ),
    "an empty stream": ({"tensors": [["w", "f32", [4], "r", "f32"]]}, [b""]),
    "no section": ({"tensors": [["w", "f32", [4], "r", "f32"]]}, []),
    "a section too many": ({"tensors": [["w", "f32", [4], "r", "f32"]]}, [FLOATS, FLOATS]),
    "two of one name": (
        {"tensors": [["w", "f32", [2], "r", "f32"], ["w", "f32", [2], "r", "f32"]]},
        [FLOATS],
    ),
    "equal to itself": ({"tensors": [["w", "w"]]}, []),
    "equal to what is unknown": ({"tensors": [["w", "v"]]}, []),
    "equal to what comes later": (
        {"tensors": [["v", "w"], ["w", "f32", [4], "r", "f32"]]},
        [FLOATS],
    ),
    "stored in more than it takes": (
        {"tensors": [["w", "i8", [2], "r", "f64"]]},
        [encode_floats(b"\0" * 16, 8)],
    ),
    "megabytes of coded numbers": (
        {"tensors": [["w", "i8", [(1 << 22) + 1], "r", "i8"]]},
        [b"\x01" * 2000],
    ),
    "a bool that is 2": (
        {"tensors": [["w", "bool", [2], "r", "bool"]]},
        [encode_floats(b"\x01\x02", 1)],
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.slow
def test_hostile_files_are_refused(name: str) -> None:
    header, sections = HOSTILE[name]
    refused(join(header, sections))


def framed(text: bytes, *sections: bytes) -> bytes:
    """A file whose header is any text at all."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    content, checksum = MAGIC, zlib.crc32(MAGIC)
    for payload in (deflate.compress(text) + deflate.flush(), *sections):
        checksum = zlib.crc32(payload, checksum)
        content += varint.encode(len(payload)) + payload + checksum.to_bytes(4, "little")
    return content


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"tensors"',
        b"\xff\xfe",
        b"9" * 10_000,
        b"[" * 100_000,
        b'{"tensors":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"tensors":[' + b"[" * 900 + b"]" * 900 + b"]}",
        b'{"tensors":[],"about":{"a":' * 5000,
        b'{"tensors":[],"about":{"a":"\\ud800"}}',  # half a surrogate
        b" " * (HEADER_LIMIT + 1) + b'{"tensors":[]}',
        b'{"tensors":[' + b"[]," * 100_000 + b"[]]}",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_invalid_headers_are_refused(text: bytes) -> None:
    refused(framed(text))


def aliases(number: int, *shape: int) -> bytes:
    """A file of ones, and of so many tensors that equal them."""
    names = [[f"a{i}", "w"] for i in range(number)]
    ones = encode_layer(torch.ones(shape).numpy(), shape, 1, 0)
    return join(
        {"tensors": [["w", "f32", shape, "c", 1, "f32"], *names]},
        [ones, encode_floats(b"\0\0\x80?", 4)],
    )


# Few bytes that may hold as many positions: 2^28 floats of 4 bytes, with what the limit has to say.
POSITIONS = join(
    {"tensors": [["w", "f32", [1 << 14, 1 << 14], "c", 1, "f32"]]},
    [b"\x00\x0a\x80" + bytes((1 << 28) // 22_000), encode_floats(b"\0\0\x80?", 4)],
)
BEYOND = {
    "positions": (POSITIONS, 1 << 30),
    "equal tensors": (aliases(5000, 250, 4000), 5001 * 4_000_000),
}


@pytest.mark.slow
def test_a_small_file_cannot_take_much_memory() -> None:
    bombs = [framed(b" " * (1 << 26)), framed(b"[" + b"[]," * (1 << 22))]
    bombs += [join(*HOSTILE[n]) for n in HOSTILE if n.startswith(("giga", "tera", "empty", "a co"))]
    bombs.append(BEYOND["equal tensors"][0])
    assert max(map(len, bombs)) < 1 << 19
    tracemalloc.start()
    try:
        for bomb in bombs:
            refused(bomb)
        for bomb, size in BEYOND.values():
            for reading in (artifact.loads, artifact.describe):
                with pytest.raises(artifact.ArtifactError, match=f"would take {size:,} bytes"):
                    reading(bomb, size - 1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20


def test_what_may_be_taken_is_the_callers_to_say(monkeypatch) -> None:
    content = aliases(9, 10, 10)
    assert len(artifact.loads(content, 10 * 400)) == 10
    said = r"4,000 bytes, and 3,999 are allowed; .* max_bytes=BYTES in Python, --max-bytes"
    with pytest.raises(artifact.ArtifactError, match=said):
        artifact.loads(content, 10 * 400 - 1)
    monkeypatch.setattr(read, "_MIN_ALLOWED", 0)
    assert len(artifact.loads(content)) == 10
    monkeypatch.setattr(read, "_GROWTH", 1)
    with pytest.raises(artifact.ArtifactError, match=f"and {len(content)} are allowed"):
        artifact.describe(content)


def test_equal_tensors_are_described_without_being_made(monkeypatch) -> None:
    content = aliases(900, 100, 100)
    counted = []
    count = Tensor.count_nonzero
    monkeypatch.setattr(Tensor, "count_nonzero", lambda t: counted.append(t.shape) or count(t))
    monkeypatch.setattr(Tensor, "clone", None)
    layers = artifact.describe(content).layers
    assert len(counted) == 1
    assert [layer["nonzero"] for layer in layers] == [10_000] * 901
    assert layers[-1]["kind"] == "= w"
    assert layers[-1]["name"] == "a899"


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_reported(error: Exception, monkeypatch) -> None:
    def decode_layer(*args: object) -> None:
        raise error

    monkeypatch.setattr(read, "decode_layer", decode_layer)
    with pytest.raises(artifact.ArtifactError, match="not enough memory for its tensors, 4,000 by"):
        artifact.loads(aliases(9, 10, 10))


def test_other_errors_are_not_taken_for_it(monkeypatch) -> None:
    def decode_layer(*args: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(read, "decode_layer", decode_layer)
    with pytest.raises(RuntimeError, match="a bug"):
        artifact.loads(aliases(9, 10, 10))


def test_writing_and_reading_take_little_memory_beside_the_weights(monkeypatch) -> None:
    monkeypatch.setattr(tensors, "_PIECE", 1000)
    torch.manual_seed(0)
    weights = {f"{i}": shared(300, 1000, density=0.05) for i in range(6)}
    artifact.encode({"0": weights["0"]}, coder="huffman")  # compiled beforehand
    tracemalloc.start()  # what NumPy and Python allocate
    try:
        content = artifact.encode(weights, coder="huffman")
        _, encoding = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        found = artifact.loads(content)
        _, decoding = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    same(found, {name: w.half().float() for name, w in weights.items()})
    assert encoding < 5 * 300_000  # one tensor at a time, less than it takes itself
    assert decoding < (6 * 4 + 3) * 300_000


def test_a_quantized_model_has_a_published_size_by_its_bits() -> None:
    integers = torch.randint(1, 8, (40, 25)).float()
    signs = 1 - 2 * torch.randint(0, 2, (40, 25))
    scale = torch.rand(40)
    state = {
        "fc.weight": signs * integers * scale.view(-1, 1),
        "fc.weight_quantizer.scale": scale,
        "fc.weight_quantizer.width": torch.tensor(4, dtype=torch.uint8),
    }
    assert artifact.published_size(state, ["fc.weight"]).plain == 1000 * 4 / 8 + 40 * 4
    state["fc.weight"].abs_()  # seven values: sharing says it in fewer bits
    size = artifact.published_size(state, ["fc.weight"])
    assert size.plain == 1000 * 3 / 8 + 7 * 4 + 40 * 4
    state["fc.weight"][:, ::2] = 0  # then as a codebook of seven, for all channels alike
    size = artifact.published_size(state, ["fc.weight"])
    assert size.plain < 480 * (3 + 5) / 8 + 7 * 4 + 40 * 4 + 50
