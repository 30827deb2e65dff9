"""Parts of an experiment, built from settings or passed as Python objects."""

import threading

import pytest
from torch import nn

from trainer.config import ClusterConfig, Config
from trainer.config.instantiate import Factory, to_dataclass
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": "auto"}, "cluster.workers=auto: it must be a whole number"),
        ({"workers": 1.5}, "cluster.workers=1.5: it must be a whole number"),
        ({"start_timeout_s": "1 min"}, "cluster.start_timeout_s=1 min: it must be a number"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(settings, message):
    with pytest.raises(ConfigError) as error:
        to_dataclass(ClusterConfig, settings, "cluster")
    assert str(error.value) == message


def test_a_section_that_is_no_mapping_is_refused_with_its_settings():
    with pytest.raises(ConfigError, match=r"^artifact=True: .* with settings among make, dtype"):
        to_dataclass(Config, {"artifact": True})
    with pytest.raises(ConfigError, match=r"^channels_last=maybe: it must be true or false$"):
        to_dataclass(Config, {"channels_last": "maybe"})
