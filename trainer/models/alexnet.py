"""AlexNet with grouped convolutions, the 61M-parameter net of the compression literature."""

from torch import Tensor, nn


class AlexNet(nn.Module):
    """Krizhevsky et al. 2012, with groups for its two GPUs: 60,965,224 parameters.

    Images [N, 3, 224, 224] (or 227x227) -> logits [N, classes]. Weights start as N(0, 0.01), biases
    at 1 in the layers that the paper names (section 5) and at 0 in the others. `dropout` is the
    probability of dropping a unit of fc6 or fc7.
    """

    def __init__(self, classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 96, 11, stride=4, padding=2)
        self.conv2 = nn.Conv2d(96, 256, 5, padding=2, groups=2)
        self.conv3 = nn.Conv2d(256, 384, 3, padding=1)
        self.conv4 = nn.Conv2d(384, 384, 3, padding=1, groups=2)
        self.conv5 = nn.Conv2d(384, 256, 3, padding=1, groups=2)
        self.fc6 = nn.Linear(256 * 6 * 6, 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, classes)
        self.pool = nn.MaxPool2d(3, stride=2)
        self.norm = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)
        self.dropout = nn.Dropout(dropout)

        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.normal_(layer.weight, std=0.01)
                ones = layer in (self.conv2, self.conv4, self.conv5, self.fc6, self.fc7)
                nn.init.constant_(layer.bias, 1.0 if ones else 0.0)

    def forward(self, images: Tensor) -> Tensor:
        x = self.pool(self.norm(self.conv1(images).relu()))
        x = self.pool(self.norm(self.conv2(x).relu()))
        x = self.conv3(x).relu()
        x = self.conv4(x).relu()
        x = self.pool(self.conv5(x).relu())
        x = self.dropout(self.fc6(x.flatten(1)).relu())
        x = self.dropout(self.fc7(x).relu())
        logits: Tensor = self.fc8(x)
        return logits
