"""MNIST, read from the four IDX files that ship with the package (files/mnist/README.md).

Images are kept as bytes. A batch is shifted and normalised when it is read, which is faster than
reading four times as many bytes of normalised images from memory.
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
SPLIT_SEED = 0  # of the permutation that chooses validation images: the same for every run


def normalise(images: Tensor) -> Tensor:
    """Bytes -> (x / 255 - mean) / deviation, float32."""
    return images.float().mul_(1 / (255 * DEVIATION)).sub_(MEAN / DEVIATION)


def read_idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """Read the uint8 tensor in the IDX file `name` of `folder`, plain or with .gz.

    Raises:
        ValueError: The file is missing or damaged, or has another number of dimensions.
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
            raise ValueError(f"{path}: damaged or truncated gzip file ({error})") from None

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
            f"{path}: its header announces {math.prod(shape)} values {shape}, but it contains "
            f"{values}"
        )
    # The bytes are copied, because torch warns of read-only memory.
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
            f"{folder}: {prefix}-images-idx3-ubyte contains {len(images)} images, but "
            f"{prefix}-labels-idx1-ubyte contains {len(labels)} labels"
        )
    if labels.max() > 9:
        raise ValueError(
            f"{folder}/{prefix}-labels-idx1-ubyte: it contains the label {int(labels.max())}; "
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
    """MNIST: 60,000 training images, some held out for validation, and 10,000 test images.

    Inputs are float32 [n, 1, 28, 28], normalised; targets are int64 [n].

    Args:
        seed: Together with epoch and image, it determines the random shifts.
        root: Folder with the four IDX files, of MNIST or of a dataset in its format. None: the
            files of this package.
        validation: Number of training images held out for validation, the same in every run.
        train: Number of training images, the first of a fixed permutation. None: all others.
        test: Number of test images, likewise. None: all.
        shift: Maximum random shift of a training image in each direction, in pixels.

    Raises:
        ValueError: A file is missing or damaged, or a number is out of range.
    """
    folder = FILES if root is None else Path(root).expanduser()
    return _splits(folder, _stamps(folder), seed, validation, train, test, shift)


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, time and size of each file, which show whether a file has changed."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files)


@lru_cache(maxsize=1)  # for the next trial on a warm worker; splits are never changed
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
