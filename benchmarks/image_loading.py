"""data=images beside torch's DataLoader.

    python benchmarks/image_loading.py CIFAR10_FOLDER
    python benchmarks/image_loading.py --quick    # with a few images of noise: does it run?

Both read JPEG files from the same zip (train.zip in the folder), decode them with Pillow, pad by 4
pixels, crop, mirror, and normalize, with the same number of loader processes and the same batches
of 128. The plain loop is what PyTorch's documentation shows: a Dataset that returns a normalized
tensor, and DataLoader's own collation. They take turns; the table has medians of images/s.
"""

import argparse
import io
import platform
import random
import statistics
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data import images

BATCH, IMAGES, TURNS = 128, 2048, 5
MEAN = torch.tensor((0.485, 0.456, 0.406)).view(3, 1, 1)
STD = torch.tensor((0.229, 0.224, 0.225)).view(3, 1, 1)


class ZippedImages(Dataset[tuple[Tensor, int]]):
    """The plain Dataset; each process opens the zip for itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.archive: zipfile.ZipFile | None = None
        with zipfile.ZipFile(path) as archive:
            self.names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[1] for name in self.names})
        self.targets = [classes.index(name.split("/")[1]) for name in self.names]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.archive is None:
            self.archive = zipfile.ZipFile(self.path)
        image = Image.open(io.BytesIO(self.archive.read(self.names[index]))).convert("RGB")
        image = ImageOps.expand(image, 4)
        left, top = random.randint(0, 8), random.randint(0, 8)
        image = image.crop((left, top, left + 32, top + 32))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return tensor.sub(MEAN).div(STD), self.targets[index]


def plain(path: Path, workers: int) -> Iterator[float]:
    """Images per second of one pass after another."""
    data = ZippedImages(path)
    orders = iter(lambda: torch.randperm(len(data))[:IMAGES].tolist(), None)
    order: list[int] = []

    class Order:
        def __iter__(self) -> Iterator[int]:
            return iter(order)

        def __len__(self) -> int:
            return len(order)

    loader = DataLoader(
        data,
        BATCH,
        sampler=Order(),
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="forkserver" if workers else None,
    )
    while True:
        order[:] = next(orders)
        yield timed(iter(loader))


def ours(root: Path, workers: int) -> Iterator[float]:
    """Likewise."""
    split = images(str(root), pad=4, flip=True, loader_workers=workers).train
    for epoch in range(1000):
        order = torch.randperm(len(split))[:IMAGES].split(BATCH)
        yield timed(iter(split.batches(order, epoch)))


def timed(batches: Iterator[tuple[Tensor, Tensor]]) -> float:
    began, count = time.perf_counter(), 0
    for inputs, _ in batches:
        count += len(inputs)
    return count / (time.perf_counter() - began)


def write_noise(path: Path) -> None:
    """A zip like CIFAR-10's, with a few images of noise."""
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(40):
            content = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(content, "JPEG")
            archive.writestr(f"train/class{number % 2}/{number:04d}.jpg", content.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="holds CIFAR-10's train.zip")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            write_noise(Path(folder) / "train.zip")
            compare(Path(folder), (0,), 1)
    elif args.folder is None:
        parser.error("name the folder that holds CIFAR-10's train.zip, or use --quick")
    else:
        compare(args.folder, (0, 1, 2), TURNS)


def compare(root: Path, loader_processes: tuple[int, ...], turns: int) -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, n = {turns}\n")
    print("| loader processes | data=images, images/s | DataLoader, images/s | ratio |")
    print("| --- | --- | --- | --- |")
    for workers in loader_processes:
        one, other = ours(root, workers), plain(root / "train.zip", workers)
        next(one), next(other)  # processes start, files are cached
        pairs = [(next(one), next(other)) for _ in range(turns)]
        first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {workers} | {first:,.0f} | {second:,.0f} | {first / second:.2f} |", flush=True)


if __name__ == "__main__":
    main()
