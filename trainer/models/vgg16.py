"""VGG-16: thirteen 3x3 convolutions and three fully connected layers."""

from torch import Tensor, nn

# Filters of the 3x3 convolutions; each group ends in a 2x2 max-pool.
CONVOLUTIONS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """Configuration D of Simonyan & Zisserman 2014 (table 1): 138,357,544 parameters.

    Images [N, 3, 224, 224] -> logits [N, classes]. Weights start as He et al. 2015 propose
    (fan-out), which trains without the paper's pre-training of shallower nets. `dropout` is the
    probability of dropping a unit of the two hidden fully connected layers.
    """

    def __init__(self, classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for group in CONVOLUTIONS:
            for filters in group:
                layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
                channels = filters
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.fc1 = nn.Linear(512 * 7 * 7, 4096)
        self.fc2 = nn.Linear(4096, 4096)
        self.fc3 = nn.Linear(4096, classes)
        self.dropout = nn.Dropout(dropout)

        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
            if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images).flatten(1)
        x = self.dropout(self.fc1(x).relu())
        x = self.dropout(self.fc2(x).relu())
        logits: Tensor = self.fc3(x)
        return logits
