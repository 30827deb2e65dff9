"""What a .dcz file gives back, and that nothing but a whole one is taken for one."""

import random
import runpy
import sys
import tracemalloc
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from trainer import artifact
from trainer.artifact import __main__ as command
from trainer.artifact.__main__ import main
from trainer.artifact.container import HEADER_LIMIT, MAGIC, join, split
from trainer.compress.codebooks import cluster
from trainer.compress.coding import encode_floats, encode_layer, varint


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
@pytest.mark.parametrize("numbers", ["fp16", "fp32"])
def test_a_whole_model_comes_back(model: dict[str, Tensor], coder: str, numbers: str) -> None:
    same(artifact.loads(artifact.encode(model, numbers, coder)), model)


def test_a_file_without_tensors() -> None:
    assert artifact.loads(artifact.encode({})) == {}


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
def test_any_shape_and_density(shape: list[int], density: float, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    weights = {"a": shared(*shape, density=density, k=k), "b": pruned(*shape, density=density)}
    same(artifact.loads(artifact.encode(weights, "fp32")), weights)


def test_tied_weights_are_stored_once_and_come_back_as_one(model: dict[str, Tensor]) -> None:
    content = artifact.encode(model)
    alone = artifact.encode({k: v for k, v in model.items() if k != "decoder.weight"})
    assert len(content) - len(alone) < 40
    found = artifact.loads(content)
    assert found["decoder.weight"] is found["encoder.weight"]


def test_what_the_format_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match=r"phase: a torch\.complex64 tensor cannot be written"):
        artifact.encode({"phase": torch.zeros(2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="the header takes"):
        artifact.encode({}, about={"text": "x" * HEADER_LIMIT})


def test_describe(model: dict[str, Tensor]) -> None:
    about = {"name": "x", "model": {"_target_": "Net"}, "accuracy": 0.5}
    content = artifact.encode(model, about=about)
    found = artifact.describe(content)
    assert found.about == about
    # Floating tensors but the running mean, and what is tied once.
    assert found.parameters == 162 + 6 + 600 + 600 + 35 + 240
    layers = {layer["name"]: layer for layer in found.layers}
    assert list(layers) == list(model)
    for name, tensor in model.items():
        assert layers[name]["shape"] == list(tensor.shape)
        assert layers[name]["weights"] == tensor.numel()
        assert layers[name]["nonzero"] == int(tensor.count_nonzero())
    kinds = {name: (layer["kind"], layer["bits"]) for name, layer in layers.items()}
    assert kinds["fc.weight"] == ("shared", 3)
    assert kinds["conv.bias"] == ("plain", 16)
    assert kinds["pruned.weight"] == ("pruned", 32)
    assert kinds["dense.weight"] == ("plain", 32)
    assert kinds["norm.num_batches_tracked"] == ("plain", 64)
    assert kinds["mask"] == ("plain", 8)
    assert kinds["decoder.weight"] == ("= encoder.weight", 32)
    assert layers["decoder.weight"]["bytes"] == 0
    header = len(content) - sum(layer["bytes"] for layer in found.layers)
    assert 0 < header < 600


# --- damage ---


def refused(content: bytes) -> None:
    for read in (artifact.loads, artifact.describe):
        with pytest.raises(artifact.ArtifactError):
            read(content)


def frames(content: bytes) -> list[bytes]:
    """The sections of a file with their lengths and checksums."""
    found, place = [], len(MAGIC)
    header, sections = split(content)
    sizes = [len(s) for s in sections]
    rest = sum(len(varint.put(n)) + n + 4 for n in sizes)
    found.append(content[place : len(content) - rest])
    place = len(content) - rest
    for n in sizes:
        found.append(content[place : place + len(varint.put(n)) + n + 4])
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
    other = frames(artifact.encode({f"fc{i}": shared(20, 20) for i in range(3)}))
    refused(MAGIC + b"".join([head, *other[1:]]))


@given(st.binary(max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    refused(noise)
    refused(MAGIC + noise)


def test_another_version_is_named() -> None:
    with pytest.raises(artifact.ArtifactError, match="version 02"):
        artifact.loads(b"DCZ\x02" + artifact.encode({})[4:])
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
    "a bool that is 2": (
        {"tensors": [["w", "bool", [2], "r", "bool"]]},
        [encode_floats(b"\x01\x02", 1)],
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(name: str) -> None:
    header, sections = HOSTILE[name]
    refused(join(header, sections))


def framed(text: bytes, *sections: bytes) -> bytes:
    """A file whose header is any text at all."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    content, checksum = MAGIC, zlib.crc32(MAGIC)
    for payload in (deflate.compress(text) + deflate.flush(), *sections):
        checksum = zlib.crc32(payload, checksum)
        content += varint.put(len(payload)) + payload + checksum.to_bytes(4, "little")
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
def test_headers_that_are_none_are_refused(text: bytes) -> None:
    refused(framed(text))


def test_a_small_file_cannot_take_much_memory() -> None:
    bombs = [framed(b" " * (1 << 26)), framed(b"[" + b"[]," * (1 << 22))]
    bombs += [join(*HOSTILE[n]) for n in HOSTILE if n.startswith(("giga", "tera", "empty", "a co"))]
    assert max(map(len, bombs)) < 1 << 19
    tracemalloc.start()
    try:
        for bomb in bombs:
            refused(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200 << 20


# --- the command ---


def test_show_verify_and_decode(model, tmp_path, capsys) -> None:
    file, out = tmp_path / "model.dcz", tmp_path / "out.safetensors"
    file.write_bytes(artifact.encode(model, about={"name": "tiny"}))
    assert main(["show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "name: tiny" in shown
    assert "6 x 3 x 3 x 3" in shown
    assert main(["verify", str(file)]) == 0
    assert f"whole, {len(model)} tensors, {file.stat().st_size:,} bytes" in capsys.readouterr().out
    assert main(["decode", str(file), str(out)]) == 0
    loaded = load_file(out)
    same({name: loaded[name] for name in model}, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.dcz", "out.safetensors"]
    same(artifact.load(file), model)


def test_names_are_shown_as_they_are(tmp_path, capsys) -> None:
    file = tmp_path / "[bold].dcz"
    file.write_bytes(artifact.encode({"a[/b]": torch.ones(2)}, about={"x": "[/y]"}))
    assert main(["show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "a[/b]" in shown
    assert "x: [/y]" in shown


@pytest.mark.parametrize("verb", ["show", "verify", "decode"])
def test_a_damaged_or_missing_file_ends_in_one_line(verb, model, tmp_path, capsys) -> None:
    file = tmp_path / "model.dcz"
    arguments = [verb, str(file), *([str(tmp_path / "out")] if verb == "decode" else [])]
    for content, told in ((None, "No such file"), (artifact.encode(model)[:-1], "cut short")):
        if content is not None:
            file.write_bytes(content)
        assert main(arguments) == 1
        shown, said = capsys.readouterr()
        assert shown == ""
        assert said.startswith(str(file))
        assert told in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(model, tmp_path, capsys) -> None:
    file = tmp_path / "model.dcz"
    file.write_bytes(artifact.encode(model))
    assert main(["decode", str(file), str(tmp_path / "no" / "out.safetensors")]) == 1
    assert "No such file" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["unpack", "x"], ["decode", "x"]])
def test_wrong_arguments_exit_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m trainer.artifact" in capsys.readouterr().err


def test_the_module_is_the_command(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "model.dcz").write_bytes(b"nonsense")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["artifact", "verify", "model.dcz"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command.__file__, run_name="__main__")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said == "model.dcz: this is no .dcz file: it does not begin with DCZ\n"


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
