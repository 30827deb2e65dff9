"""A small net of Inception blocks for images of 32 x 32 pixels."""

import torch
from torch import Tensor, nn


def _convolution(inputs: int, width: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, width, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )


class InceptionBlock(nn.Module):
    """Four branches side by side with `width` filters each: 1x1, 3x3, two 3x3, and a pooling.

    Inception V3's first block (Szegedy et al., Rethinking the Inception Architecture, 2015,
    arXiv:1512.00567, figure 5), in which two 3x3 convolutions stand for a 5x5.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.one = _convolution(inputs, width, 1)
        self.three = nn.Sequential(_convolution(inputs, width, 1), _convolution(width, width, 3))
        self.five = nn.Sequential(
            _convolution(inputs, width, 1),
            _convolution(width, width, 3),
            _convolution(width, width, 3),
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), _convolution(inputs, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.five(x), self.pool(x)], 1)


class InceptionCifar(nn.Module):
    """A convolution, then three Inception blocks with a pooling between them.

    Images [N, in_channels, H, W] (from 4x4 up) -> logits [N, classes]. With the defaults 135,786
    parameters; block i has 4 * (1, 2, 3)[i] * `width` channels.
    """

    def __init__(self, width: int = 16, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}: it must be at least 1")
        self.stem = _convolution(in_channels, 2 * width, 3)
        self.block1 = InceptionBlock(2 * width, width)
        self.block2 = InceptionBlock(4 * width, 2 * width)
        self.block3 = InceptionBlock(8 * width, 3 * width)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(12 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.block1(self.stem(images)))
        x = self.block3(self.pool(self.block2(x)))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
