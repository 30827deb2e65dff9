"""Networks from the literature, one file each.

All are plain `nn.Module`s without code of this framework. `model._target_` names one of these or
any other class or function that returns a module; the other keys of `model` are its arguments.
"""

from trainer.models.alexnet import AlexNet
from trainer.models.convnet import ConvNet
from trainer.models.inception_cifar import InceptionCifar
from trainer.models.lenet5 import LeNet5
from trainer.models.lenet300 import LeNet300
from trainer.models.lstm import LSTMLanguageModel
from trainer.models.resnet import ResNet, resnet18, resnet50
from trainer.models.resnet_cifar import ResNetCifar
from trainer.models.vgg16 import VGG16

__all__ = [
    "VGG16",
    "AlexNet",
    "ConvNet",
    "InceptionCifar",
    "LSTMLanguageModel",
    "LeNet5",
    "LeNet300",
    "ResNet",
    "ResNetCifar",
    "resnet18",
    "resnet50",
]
