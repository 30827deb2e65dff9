"""The thin residual nets for small images (CIFAR, MNIST): ResNet-20, 32, 44, 56, 110."""

from torch import Tensor, nn
from torch.nn.functional import pad


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is subsampled and zero-padded.

    That is option A of He et al. 2015: a shortcut without parameters.
    """

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride = stride
        self.new_channels = width - inputs

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.stride > 1 or self.new_channels > 0:
            before = self.new_channels // 2
            shortcut = pad(
                x[:, :, :: self.stride, :: self.stride],
                (0, 0, 0, 0, before, self.new_channels - before),
            )
        y: Tensor = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)) + shortcut
        return y.relu()


class ResNetCifar(nn.Module):
    """He et al. 2015, section 4.2: `depth` = 6n + 2 layers of 16, 32 and 64 filters.

    Images [N, in_channels, H, W] (32x32 in the paper; from 4x4 up) -> logits [N, classes].
    Parameters with 10 classes: 0.27M (20), 0.46M (32), 0.66M (44), 0.85M (56), 1.7M (110).
    Raises ValueError for another depth.
    """

    def __init__(self, depth: int = 20, classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth}: it must be 6n + 2, such as 20, 32, 44, 56 or 110")
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks: list[nn.Module] = []
        channels = 16
        for width in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                blocks.append(CifarBlock(channels, width, stride=1 if width == channels else 2))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, classes)

        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.bn(self.conv(images)).relu())
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits
