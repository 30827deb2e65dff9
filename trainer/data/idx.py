"""MNIST, read from the four IDX files that ship with the package (files/mnist/README.md).

Images stay bytes in memory; a batch is shifted and normalised when it is asked for, which is
cheaper than fetching four times the bytes.
"""

import math
import zlib
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.data.augment import shift as shift_images
from trainer.data.order import permutation
from trainer.data.split import Splits, TensorSplit

FILES = Path(__file__).parent / "files" / "mnist"
MEAN, DEVIATION = 0.1307, 0.3081  # of the training pixels, scaled to [0, 1]
SPLIT_SEED = 0  # of the permutation that sets validation images apart: never the run's seed


def normalise(images: Tensor) -> Tensor:
    """Bytes -> (x / 255 - mean) / deviation, float32."""
    return images.float().mul_(1 / (255 * DEVIATION)).sub_(MEAN / DEVIATION)


def read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """The uint8 tensor in the IDX file `name` of `folder`, plain or with .gz.

    Raises a ValueError that names the file and what is wrong with it.
    """
    path = folder / f"{name}.gz"
    if not path.exists():
        path = folder / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"data.root={folder}: there is neither {name} nor {name}.gz") from None
    if path.suffix == ".gz":
        try:
            content = zlib.decompress(content, wbits=zlib.MAX_WBITS | 16)
        except zlib.error as error:
            raise ValueError(f"{path}: damaged or cut-off gzip file ({error})") from None

    start = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])  # 8: unsigned bytes
    if len(content) < start or content[:4] != magic:
        raise ValueError(
            f"{path}: not an IDX file of bytes in {dimensions} dimensions: it starts with "
            f"{content[:4].hex()} instead of {magic.hex()}"
        )
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    values = len(content) - start
    if values == 0 or values != math.prod(shape):
        raise ValueError(
            f"{path}: its header promises {math.prod(shape)} values {shape}, but it holds {values}"
        )
    # torch wants memory that it may write to, so the bytes are copied once.
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].view(shape)


def read_pair(folder: Path, prefix: str) -> tuple[Tensor, Tensor]:
    """Images uint8 [n, 1, 28, 28] and labels int64 [n] of `prefix`: train or t10k."""
    images = read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels = read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
    if images.shape[1:] != (28, 28):
        raise ValueError(
            f"{folder}/{prefix}-images-idx3-ubyte: its images are "
            f"{images.shape[1]}x{images.shape[2]} pixels instead of 28x28"
        )
    if len(images) != len(labels):
        raise ValueError(
            f"{folder}: {prefix}-images-idx3-ubyte holds {len(images)} images, "
            f"{prefix}-labels-idx1-ubyte {len(labels)} labels: they must be as many"
        )
    if labels.max() > 9:
        raise ValueError(
            f"{folder}/{prefix}-labels-idx1-ubyte: it holds the label {int(labels.max())}; "
            "digits are 0 to 9"
        )
    return images[:, None], labels.long()


def chosen(indices: Tensor, count: int | None, key: str) -> Tensor:
    """The first `count` of `indices` (None: all), sorted, because that reads memory in order."""
    if count is not None and not 1 <= count <= len(indices):
        raise ValueError(f"data.{key}={count}: it must be between 1 and {len(indices)}, or null")
    return indices[:count].sort().values


def mnist(
    seed: int = 0,
    root: str | None = None,
    validation: int = 5000,
    train: int | None = None,
    test: int | None = None,
    shift: int = 0,
) -> Splits:
    """MNIST's 60,000 training images, less the validation images, and 10,000 test images.

    Inputs float32 [n, 1, 28, 28], targets int64 [n]. `root` is a folder with the same four files,
    of MNIST or of a data set in its format; null: the ones that ship. The `validation` images are
    the same in every run; `train` and `test` keep only the first so many of a fixed permutation.
    `shift` moves each training image by up to so many pixels each way, drawn from (seed, epoch,
    image). Raises ValueError for missing or damaged files and
    impossible counts.
    """
    folder = FILES if root is None else Path(root).expanduser()
    return _splits(folder, _stamps(folder), seed, validation, train, test, shift)


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of each file: they differ once a file has changed."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files)


@lru_cache(maxsize=1)  # splits never change: the next trial on a warm worker takes the same ones
def _splits(
    folder: Path,
    stamps: tuple[tuple[str, int, int], ...],
    seed: int,
    validation: int,
    train: int | None,
    test: int | None,
    shift: int,
) -> Splits:
    images, labels = read_pair(folder, "train")
    test_images, test_labels = read_pair(folder, "t10k")
    if not 1 <= validation < len(images):
        raise ValueError(
            f"data.validation={validation}: it must be between 1 and {len(images) - 1}"
        )
    if not 0 <= shift < 28:
        raise ValueError(f"data.shift={shift}: it must be between 0 and 27 pixels")

    order = permutation(len(images), SPLIT_SEED, 0)
    held_out = chosen(order[-validation:], None, "validation")
    fitted = chosen(order[:-validation], train, "train")
    tested = chosen(permutation(len(test_images), SPLIT_SEED, 1), test, "test")
    augment = partial(shift_images, seed=seed, pixels=shift) if shift else None
    return Splits(
        train=TensorSplit(images.index_select(0, fitted), labels[fitted], augment, normalise),
        validation=TensorSplit(
            images.index_select(0, held_out), labels[held_out], prepare=normalise
        ),
        test=TensorSplit(
            test_images.index_select(0, tested), test_labels[tested], prepare=normalise
        ),
    )
