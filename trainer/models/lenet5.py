"""LeNet-5 as Caffe defines it, the variant that the pruning literature counts."""

import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d


class LeNet5(nn.Module):
    """20 and 50 filters of 5x5, 500 units (Caffe's `lenet_train_test.prototxt`).

    431,080 parameters: 430,500 weights and 580 biases. As in Caffe's file, the only ReLU follows
    fc1; the convolutions are followed by max-pooling alone.
    Images [N, 1, 28, 28] -> logits [N, classes].
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = max_pool2d(self.conv1(images), 2)
        x = max_pool2d(self.conv2(x), 2)
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(x)
        return logits
