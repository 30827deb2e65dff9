"""data=images beside torch's DataLoader: `python benchmarks/image_loading.py CIFAR10_FOLDER`

Both read JPEG files from the same zip (train.zip in the folder), decode them with Pillow, pad by 4
pixels, crop, mirror, and normalize, with the same number of loader processes and the same batches
of 128. The plain loop is what PyTorch's documentation shows: a Dataset that returns a normalized
tensor, and DataLoader's own collation. They take turns; the table has medians of images/s.
"""

import io
import platform
import random
import statistics
import sys
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
            return IMAGES

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


def main(root: Path) -> None:
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, n = {TURNS}\n")
    print("| loader processes | data=images, images/s | DataLoader, images/s | ratio |")
    print("| --- | --- | --- | --- |")
    for workers in (0, 1, 2):
        one, other = ours(root, workers), plain(root / "train.zip", workers)
        next(one), next(other)  # processes start, files are cached
        pairs = [(next(one), next(other)) for _ in range(TURNS)]
        first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"| {workers} | {first:,.0f} | {second:,.0f} | {first / second:.2f} |", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
