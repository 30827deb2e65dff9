"""Residual nets for ImageNet: ResNet-18 and ResNet-50."""

from typing import ClassVar

from torch import Tensor, nn

STAGE_WIDTHS = (64, 128, 256, 512)


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution that keeps the size (divided by `stride`), then batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions of `width` filters (He et al. 2015, figure 5 left)."""

    expansion: ClassVar[int] = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, width, 3, stride)
        self.conv2 = conv_bn(width, width, 3)
        same = stride == 1 and inputs == width
        self.shortcut = nn.Identity() if same else conv_bn(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x).relu()) + self.shortcut(x)
        return y.relu()


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with `width` filters inside and 4 `width` outside.

    He et al. 2015, figure 5 right, with the stride in the 3x3 convolution as in Goyal et al. 2017.
    """

    expansion: ClassVar[int] = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = conv_bn(inputs, width, 1)
        self.conv2 = conv_bn(width, width, 3, stride)
        self.conv3 = conv_bn(width, outputs, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv3(self.conv2(self.conv1(x).relu()).relu()) + self.shortcut(x)
        return y.relu()


class ResNet(nn.Module):
    """The net of He et al. 2015, table 1, with `blocks` blocks in its four stages.

    Images [N, 3, 224, 224] (any size from 32x32 up works) -> logits [N, classes].
    """

    def __init__(
        self, block: type[BasicBlock | Bottleneck], blocks: tuple[int, int, int, int], classes: int
    ) -> None:
        super().__init__()
        self.stem = conv_bn(3, 64, 7, stride=2)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        layers: list[nn.Module] = []
        channels = 64
        for stage, (width, count) in enumerate(zip(STAGE_WIDTHS, blocks, strict=True)):
            for i in range(count):
                layers.append(block(channels, width, stride=2 if stage > 0 and i == 0 else 1))
                channels = width * block.expansion
        self.stages = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, classes)

        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.pool(self.stem(images).relu()))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet18(classes: int = 1000) -> ResNet:
    """ResNet-18: 11,689,512 parameters with 1,000 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes)


def resnet50(classes: int = 1000) -> ResNet:
    """ResNet-50: 25,557,032 parameters with 1,000 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes)
