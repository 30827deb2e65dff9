"""LeNet-300-100: two hidden layers, for 28x28 grey images."""

import torch
from torch import Tensor, nn


class LeNet300(nn.Module):
    """784-300-100-classes with ReLU (LeCun et al. 1998, table 1): 266,610 parameters.

    Images [N, 1, 28, 28] (or anything that flattens to [N, 784]) -> logits [N, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.fc1 = nn.Linear(784, 300)
        self.fc2 = nn.Linear(300, 100)
        self.fc3 = nn.Linear(100, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.fc1(images.flatten(1)))
        x = torch.relu(self.fc2(x))
        logits: Tensor = self.fc3(x)
        return logits
