"""Decodes image files to pixels of a fixed size. Needs Pillow: the extra `images`."""

import io
import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DRAFT = 2  # a JPEG is decoded to at least this multiple of the wanted size, then scaled
_ASPECT = math.log(3 / 4), math.log(4 / 3)  # of random crops; Szegedy et al., 2015, arXiv:1409.4842
_ATTEMPTS = 10  # to draw a crop that fits, as in torchvision.transforms.RandomResizedCrop


def pillow() -> Any:
    """The module PIL.Image.

    Raises:
        ValueError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(
            "data: reading images needs Pillow: run pip install '.[images]' in the checkout"
        ) from error
    return Image


@dataclass(frozen=True)
class Pixels:
    """Decodes, scales, crops and augments images to uint8 [height, width, channels].

    Training draws from Python's generator; evaluation scales the shorter side and crops the center.

    Args:
        channels: 3 (RGB) or 1 (grey).
        size: Height and width of the result; None: those of the image.
        resize: Length of the shorter side before the crop; None: `size`, if there is one.
        area: Range of the fraction of the image that a training crop covers before it is scaled to
            `size`; None: the image is scaled by its shorter side, as in evaluation.
        pad: Pixels added on each side, in black, before a training crop.
        flip: Whether half of the training images are mirrored.
        training: Whether to augment.
    """

    channels: int
    size: int | None
    resize: int | None
    area: tuple[float, float] | None
    pad: int
    flip: bool
    training: bool

    def decode(self, content: bytes) -> Any:
        """The image in a file, a PIL.Image in RGB or grey."""
        image = pillow().open(io.BytesIO(content))
        mode = "RGB" if self.channels == 3 else "L"
        side = self.resize or self.size
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, several times as fast.
        if side and image.format == "JPEG" and not (self.training and self.area):
            image.draft(mode, (_DRAFT * side, _DRAFT * side))
        return image.convert(mode)

    def __call__(self, content: bytes) -> Tensor:
        """The pixels of an image file.

        Raises:
            OSError, ValueError: The file is not an image, damaged, or smaller than the crop.
        """
        image = self.decode(content)
        if self.training and self.area:
            image = self._random_area(image)
        else:
            image = self._crop(self._scaled(image))
        if self.training and self.flip and random.random() < 0.5:
            image = image.transpose(pillow().Transpose.FLIP_LEFT_RIGHT)
        pixels: NDArray[np.uint8] = np.array(image, dtype=np.uint8)
        return torch.from_numpy(pixels.reshape(image.height, image.width, self.channels))

    def _scaled(self, image: Any) -> Any:
        side = self.resize or self.size
        shorter = min(image.size)
        if side is None or shorter == side:
            return image
        width, height = (max(side, round(length * side / shorter)) for length in image.size)
        return image.resize((width, height), pillow().Resampling.BILINEAR)

    def _crop(self, image: Any) -> Any:
        width, height = (self.size, self.size) if self.size else image.size
        pad = self.pad if self.training else 0
        free_x, free_y = image.width + 2 * pad - width, image.height + 2 * pad - height
        if free_x == free_y == 0 and not pad:
            return image
        if self.training:
            left, top = random.randint(0, free_x) - pad, random.randint(0, free_y) - pad
        else:
            left, top = free_x // 2, free_y // 2
        return image.crop((left, top, left + width, top + height))  # black outside of the image

    def _random_area(self, image: Any) -> Any:
        assert self.area is not None
        assert self.size is not None
        for _ in range(_ATTEMPTS):
            target = image.width * image.height * random.uniform(*self.area)
            aspect = math.exp(random.uniform(*_ASPECT))
            width, height = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
            if 0 < width <= image.width and 0 < height <= image.height:
                left = random.randint(0, image.width - width)
                top = random.randint(0, image.height - height)
                break
        else:
            width = height = min(image.size)
            left, top = (image.width - width) // 2, (image.height - height) // 2
        box = (left, top, left + width, top + height)
        return image.resize((self.size, self.size), pillow().Resampling.BILINEAR, box)


@dataclass(frozen=True)
class Normalize:
    """uint8 [n, height, width, channels] -> (x / 255 - mean) / std, float32 [n, channels, h, w]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Tensor) -> Tensor:
        n, height, width, channels = pixels.shape
        values = torch.empty(n, channels, height, width)
        values.copy_(pixels.permute(0, 3, 1, 2))
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return values.mul_(1 / (255 * std)).sub_(mean / std)
