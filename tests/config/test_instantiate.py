"""Parts of an experiment, built from settings or passed as Python objects."""

import threading

import pytest
from torch import nn

from trainer.config.instantiate import Factory
from trainer.errors import ConfigError


def test_an_object_of_another_type_is_refused():
    factory = Factory("model", {"_object_": "net"}, nn.Module, {"net": 3})
    with pytest.raises(
        ConfigError, match="model: an object of type int was passed, but a Module is needed"
    ):
        factory.build()
    with pytest.raises(ConfigError, match="of type int"):
        _ = factory.given


def test_a_class_that_its_module_does_not_have_is_named():
    with pytest.raises(ConfigError, match=r"trainer\.models has no LeNet50; did you mean LeNet5"):
        Factory("model", {"_target_": "trainer.models.LeNet50"}, nn.Module)


def test_an_object_that_cannot_be_copied_is_refused():
    net = nn.Linear(2, 2)
    net.lock = threading.Lock()
    factory = Factory("model", {"_object_": "net"}, nn.Module, {"net": net})
    with pytest.raises(
        ConfigError,
        match=r"model: the Linear that was passed cannot be copied: TypeError: .*lock.*"
        "pass the class or function that makes it",
    ):
        factory.build()
