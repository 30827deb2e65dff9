"""Image files in one folder per class: in folders, zip files, or WebDataset tar files."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from trainer.data.archives import Files, TarFiles, open_files
from trainer.data.datasets import SPLIT_SEED, DatasetSplit, held_out_size
from trainer.data.order import permutation
from trainer.data.pixels import Normalize, Pixels, pillow
from trainer.data.split import SampleError, Split, Splits

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's training set, RGB
_GREY_MEAN, _GREY_STD = (0.449,), (0.226,)  # their means

Transform = Callable[[Any], Tensor]
"""From a PIL.Image to a tensor of floats, such as torchvision's v2 transforms."""


class LabelledFiles:
    """The image files of one set, and their classes.

    Attributes:
        files: All files of the folder or archive.
        numbers: Numbers of those files that are images.
        targets: The class of each image.
        classes: Names of the classes; empty if .cls files hold numbers.
    """

    def __init__(self, path: Path, classes: Sequence[str] | None = None) -> None:
        """Args:
            path: A folder, a .zip, a .tar, or a pattern of .tar files such as train-*.tar.
            classes: Names that the folders must have; None: the existing ones, sorted.

        Raises:
            ValueError: There are no images, or a folder is not in `classes`.
        """
        self.files: Files = _open(path)
        self.numbers = [n for n, name in enumerate(self.files.names) if _is_image(name)]
        if not self.numbers:
            raise ValueError(
                f"data: there are no images in {path}: put them into one folder per class, such "
                f"as {path}/cat/1.jpg, with a name that ends in {', '.join(_SUFFIXES[:3])}, ..."
            )
        labels = {name: n for n, name in enumerate(self.files.names) if name.endswith(".cls")}
        if labels:
            self.classes: list[str] = []
            self.targets = [self._read_label(labels, number) for number in self.numbers]
            return
        folders = _class_folders(
            [self.files.names[n] for n in self.numbers], path, not path.is_dir()
        )
        self.classes = sorted(set(folders)) if classes is None else list(classes)
        codes = {name: code for code, name in enumerate(self.classes)}
        unknown = sorted(set(folders) - codes.keys())
        if unknown:
            raise ValueError(
                f"data: {path} has the class {unknown[0]!r}, which the training images do not "
                f"have; they have {', '.join(self.classes[:10])}"
            )
        self.targets = [codes[folder] for folder in folders]

    def _read_label(self, labels: dict[str, int], number: int) -> int:
        name = self.files.names[number]
        folder, slash, file = name.rpartition("/")
        label = f"{folder}{slash}{file.partition('.')[0]}.cls"
        try:
            return int(self.files(labels[label]))
        except KeyError:
            raise ValueError(
                f"data: {self.files.path(number)} has no class: {label} is missing"
            ) from None
        except ValueError as error:
            raise ValueError(
                f"data: {self.files.path(labels[label])}: it must hold the number of a class"
            ) from error


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images by number, decoded, cropped and perhaps augmented.

    Args:
        source: The files and their classes.
        indices: Numbers of the images to use.
        pixels: Decodes a file to pixels.
        transform: Used instead of `pixels`: converts the decoded image to a tensor. None: `pixels`.
    """

    trusted = True  # items need no check: they are pairs of a tensor and a class

    def __init__(
        self,
        source: LabelledFiles,
        indices: Sequence[int],
        pixels: Pixels,
        transform: Transform | None = None,
    ) -> None:
        self._files = source.files
        self._numbers = [source.numbers[index] for index in indices]
        self.targets = [source.targets[index] for index in indices]
        self._pixels = pixels
        self._transform = transform
        self.trusted = transform is None
        self.draws = pixels.training or transform is not None  # random numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        number = self._numbers[index]
        try:
            content = self._files(number)
            if self._transform is None:
                return self._pixels(content), self.targets[index]
            image = self._pixels.decode(content)
        except (OSError, ValueError, SyntaxError) as error:  # errors that Pillow raises
            raise SampleError(
                index, f"{self._files.path(number)} cannot be read as an image: {error}"
            ) from error
        return self._transform(image), self.targets[index]


def images(
    root: str,
    validation: str | None = None,
    test: str | None = None,
    hold_out: float = 0.1,
    channels: int = 3,
    size: int | None = None,
    resize: int | None = None,
    area: Sequence[float] | None = None,
    pad: int = 0,
    flip: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    train_transform: Transform | None = None,
    transform: Transform | None = None,
    loader_workers: int | None = None,
    seed: int = 0,
) -> Splits:
    """Splits of image files. Inputs float32 [n, channels, height, width], targets int64 [n].

    A set of images is a folder, a .zip, or a .tar that is not compressed, with one folder per
    class; classes are numbered in the order of their sorted names. A .tar may hold WebDataset
    samples instead: 1.jpg with 1.cls, which holds the number of the class. Archives are read
    without unpacking.

    Args:
        root: A folder with the sets train, and perhaps validation (or valid, val) and test, each a
            folder, a .zip, a .tar, or several such as train-0.tar, train-1.tar; or one set, the
            training images.
        validation: Another set for validation; None: the one in `root`, or else a part of the
            training images is held out.
        test: Likewise for testing.
        hold_out: Fraction of the training images in each part that is held out, by a fixed
            permutation. Held-out images are not augmented.
        channels: 3 (RGB) or 1 (grey); images are converted.
        size: Height and width of the inputs; None: those of the images, which must all be equal.
        resize: Length of the shorter side, in pixels, to which an image is scaled before the crop
            of `size`; None: `size`.
        area: Training crops cover a random fraction of the image in this range, such as [0.08, 1],
            at an aspect ratio between 3/4 and 4/3, and are scaled to `size`.
        pad: Training images get so many black pixels on each side before a random crop.
        flip: Whether half of the training images are mirrored.
        mean: Of each channel on a scale of [0, 1], which is subtracted; None: ImageNet's.
        std: Standard deviation of each channel, by which is divided; None: ImageNet's.
        train_transform: Converts a PIL.Image to a tensor for training, such as
            `torchvision.transforms.v2.Compose`. It replaces all settings from `size` to `std`, and
            draws from the global generators of torch, NumPy or Python.
        transform: Likewise for validation and test; give both or none.
        loader_workers: Processes per worker and split that read images; 0: the worker reads them;
            None: as many as there are CPUs that training does not use, up to 8.
        seed: Seeds the random numbers of each image.

    Raises:
        ValueError: A set is missing, empty or of other classes, or a setting is out of range.
    """
    pillow()
    _check(channels, size, resize, area, pad, loader_workers)
    if (train_transform is None) != (transform is None):
        raise ValueError(
            "data.train_transform and data.transform: give both, for training and evaluation"
        )
    normalize = None
    if transform is None:
        normalize = Normalize(
            _per_channel("mean", mean, channels, _MEAN if channels == 3 else _GREY_MEAN),
            _per_channel("std", std, channels, _STD if channels == 3 else _GREY_STD),
        )
    folder = Path(root).expanduser()
    if not folder.exists():
        raise ValueError(f"data.root={root}: there is no such file or folder")
    whole = LabelledFiles(_find(folder, "train") or folder)
    given = {
        "validation": _named_set("validation", validation, folder),
        "test": _named_set("test", test, folder),
    }
    missing = [name for name, path in given.items() if path is None]
    size_of_part = held_out_size(len(whole.numbers), hold_out, len(missing)) if missing else 0
    order = permutation(len(whole.numbers), SPLIT_SEED, 0)
    parts = order.tensor_split([size_of_part * (i + 1) for i in range(len(missing))])

    crop_area = None if area is None else (float(area[0]), float(area[1]))

    def split(source: LabelledFiles, indices: Sequence[int], training: bool) -> Split:
        pixels = Pixels(channels, size, resize, crop_area, pad, flip, training)
        chosen = train_transform if training else transform
        dataset = ImageDataset(source, indices, pixels, chosen)
        return DatasetSplit(dataset, seed, loader_workers, normalize)

    made = {"train": split(whole, parts[-1].sort().values.tolist(), True)}
    held_out = iter(parts)
    for name, path in given.items():
        if path is None:
            made[name] = split(whole, next(held_out).sort().values.tolist(), False)
        else:
            source = LabelledFiles(path, whole.classes or None)
            made[name] = split(source, range(len(source.numbers)), False)
    return Splits(**made)


def _check(
    channels: int,
    size: int | None,
    resize: int | None,
    area: Sequence[float] | None,
    pad: int,
    loader_workers: int | None,
) -> None:
    if channels not in (1, 3):
        raise ValueError(f"data.channels={channels}: it must be 3 (RGB) or 1 (grey)")
    for key, value in (("size", size), ("resize", resize)):
        if value is not None and value < 1:
            raise ValueError(f"data.{key}={value}: it must be at least 1 pixel, or null")
    if resize and (size is None or resize < size):
        raise ValueError(f"data.resize={resize}: it must be at least data.size, which is {size}")
    if area is not None:
        if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"data.area={list(area)}: it must be a range in (0, 1], as [0.08, 1]")
        if size is None or pad:
            raise ValueError("data.area: it needs data.size, and data.pad=0")
    if pad < 0:
        raise ValueError(f"data.pad={pad}: it must be at least 0 pixels")
    if loader_workers is not None and loader_workers < 0:
        raise ValueError(f"data.loader_workers={loader_workers}: it must be at least 0")


def _per_channel(
    key: str, values: Sequence[float] | None, channels: int, default: tuple[float, ...]
) -> tuple[float, ...]:
    if values is None:
        return default
    if len(values) != channels or (key == "std" and min(values) <= 0):
        raise ValueError(
            f"data.{key}={list(values)}: it must be {channels} numbers, one per channel"
        )
    return tuple(values)


def _find(root: Path, part: str) -> Path | None:
    """The set of a part in `root`; None if there is none."""
    if not root.is_dir():
        return None
    for name in _NAMES[part]:
        for path in (root / name, root / f"{name}.zip", root / f"{name}.tar"):
            if path.exists():
                return path
        if any(root.glob(f"{name}-*.tar")):
            return root / f"{name}-*.tar"
    return None


def _named_set(part: str, given: str | None, root: Path) -> Path | None:
    """The set that a setting names, or else the one in `root`."""
    if given is None:
        return _find(root, part)
    path = Path(given).expanduser()
    return path if path.is_absolute() or path.exists() else root / path


def _open(path: Path) -> Files:
    try:
        if "*" in path.name:
            return TarFiles(sorted(path.parent.glob(path.name)))
        return open_files(path)
    except ValueError as error:
        raise ValueError(f"data: {error}") from error


def _is_image(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and parts[-1].lower().endswith(_SUFFIXES)


def _class_folders(names: Sequence[str], path: Path, archive: bool) -> list[str]:
    """The folder that names the class of each image: the first one of its path.

    In an archive, folders that contain everything are left out: train/ in train.zip.
    """
    split = [name.split("/") for name in names]
    while archive and len({parts[0] for parts in split}) == 1 and min(map(len, split)) > 2:
        split = [parts[1:] for parts in split]
    for parts, name in zip(split, names, strict=True):
        if len(parts) < 2:
            raise ValueError(
                f"data: {path}: {name} is in no folder; put the images of each class into a "
                "folder with the name of the class"
            )
    return [parts[0] for parts in split]
