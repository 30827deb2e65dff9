"""The shipped MNIST, and messages about damaged files."""

import gzip
import hashlib
import re
from pathlib import Path

import pytest
import torch

from trainer.data.idx import FILES, mnist, normalise
from trainer.data.split import Splits, TensorSplit

NAMES = [
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
]


def idx(shape: list[int], values: bytes) -> bytes:
    header = bytes([0, 0, 8, len(shape)])
    return header + b"".join(n.to_bytes(4, "big") for n in shape) + values


@pytest.fixture(scope="module")
def shipped() -> Splits:
    return mnist(seed=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A data set of 20 training and 4 test images in MNIST's format: image i is filled with i."""
    for prefix, n in (("train", 20), ("t10k", 4)):
        images = b"".join(bytes([i]) * 784 for i in range(n))
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx([n, 28, 28], images))
        labels = idx([n], bytes(i % 10 for i in range(n)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return tmp_path


def images_of(split: object) -> torch.Tensor:
    """The values that the fixture's images are filled with."""
    assert isinstance(split, TensorSplit)
    return split.inputs[:, 0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_have_the_sums_in_their_readme(name: str) -> None:
    content = gzip.decompress((FILES / f"{name}.gz").read_bytes())
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    assert f"| {name} | {digest} |" in (FILES / "README.md").read_text()


def test_sizes_types_and_scale(shipped: Splits) -> None:
    assert [len(s) for s in (shipped.train, shipped.validation, shipped.test)] == [
        55_000,
        5_000,
        10_000,
    ]
    ((inputs, targets),) = shipped.train.batches([torch.arange(5000)], 0)
    assert inputs.shape == (5000, 1, 28, 28)
    assert inputs.dtype == torch.float32
    assert targets.dtype == torch.int64
    assert targets.unique().tolist() == list(range(10))
    assert abs(inputs.mean()) < 0.02
    assert abs(inputs.std() - 1) < 0.02


def test_normalise_is_the_documented_formula() -> None:
    every_byte = torch.arange(256, dtype=torch.uint8)
    expected = (every_byte.double() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(normalise(every_byte).double(), expected, rtol=0, atol=5e-7)


def test_parts_are_disjoint_complete_and_the_same_for_every_seed(folder: Path) -> None:
    first = mnist(seed=0, root=str(folder), validation=5)
    other = mnist(seed=1, root=str(folder), validation=5)
    train, validation = images_of(first.train), images_of(first.validation)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(20))
    assert torch.equal(images_of(other.train), train)
    assert torch.equal(images_of(other.validation), validation)
    assert isinstance(first.validation, TensorSplit)
    assert torch.equal(first.validation.targets, validation.long() % 10)


def test_slices_grow_by_adding_images(folder: Path) -> None:
    def trained_on(n: int | None) -> set[int]:
        split = mnist(seed=0, root=str(folder), validation=5, train=n).train
        return set(images_of(split).tolist())

    assert len(trained_on(3)) == 3
    assert trained_on(3) < trained_on(8) < trained_on(None)
    assert len(mnist(seed=0, root=str(folder), validation=5, test=2).test) == 2


def test_only_training_images_are_shifted(folder: Path) -> None:
    splits = mnist(seed=0, root=str(folder), validation=5, shift=2)
    still = mnist(seed=0, root=str(folder), validation=5)
    order = [torch.arange(len(splits.validation))]

    def batch(split: object, epoch: int | None) -> torch.Tensor:
        assert isinstance(split, TensorSplit)
        ((inputs, _),) = split.batches(order, epoch)
        return inputs

    assert not torch.equal(batch(splits.train, 0), batch(still.train, 0))
    assert torch.equal(batch(splits.train, None), batch(still.train, None))
    assert torch.equal(batch(splits.validation, 0), batch(still.validation, 0))
    background = normalise(torch.zeros(1, dtype=torch.uint8))
    # Images that are filled to the edge show background only where it moved in.
    assert (batch(splits.train, 0) == background).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"validation": 0}, "data.validation=0: it must be between 1 and 19"),
        ({"validation": 20}, "data.validation=20: it must be between 1 and 19"),
        ({"train": 0}, "data.train=0: it must be between 1 and 15"),
        ({"train": 16}, "data.train=16: it must be between 1 and 15"),
        ({"test": 5}, "data.test=5: it must be between 1 and 4"),
        ({"shift": -1}, "data.shift=-1: it must be between 0 and 27"),
        ({"shift": 28}, "data.shift=28: it must be between 0 and 27"),
    ],
)
def test_refuses_impossible_counts(folder: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mnist(seed=0, root=str(folder), **{"validation": 5, **settings})


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, b"", "not an IDX file of bytes in 3 dimensions: it starts with  instead"),
        (IMAGES, idx([20], bytes(20)), "it starts with 00000801 instead of 00000803"),
        (
            IMAGES,
            idx([20, 28, 28], bytes(784 * 20 - 1)),
            "announces 15680 values .* contains 15679",
        ),
        (
            IMAGES,
            idx([20, 28, 28], bytes(784 * 20 + 1)),
            "announces 15680 values .* contains 15681",
        ),
        (IMAGES, idx([0, 28, 28], b""), "announces 0 values"),
        (IMAGES, idx([20, 32, 32], bytes(1024 * 20)), "32x32 pixels instead of 28x28"),
        (IMAGES, idx([19, 28, 28], bytes(784 * 19)), "contains 19 images, .* 20 labels"),
        (
            LABELS + ".gz",
            gzip.compress(idx([20], bytes([10] * 20)), mtime=0),
            "the label 10",
        ),
        (
            LABELS + ".gz",
            gzip.compress(idx([20], bytes(20)), mtime=0)[:-5],
            "damaged or truncated gzip",
        ),
        (LABELS + ".gz", b"no gzip at all", "damaged or truncated gzip"),
    ],
)
def test_names_a_bad_file_and_what_is_wrong(
    folder: Path, name: str, content: bytes, message: str
) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        mnist(seed=0, root=str(folder), validation=5)
    assert str(folder) in str(error.value)
    assert name.removesuffix(".gz") in str(error.value)


def test_says_which_file_is_missing(folder: Path) -> None:
    (folder / IMAGES).unlink()
    with pytest.raises(ValueError, match=re.escape(f"neither {IMAGES} nor {IMAGES}.gz")):
        mnist(seed=0, root=str(folder), validation=5)
