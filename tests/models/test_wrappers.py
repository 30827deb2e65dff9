"""Models in the wrappers of torch.compile and DataParallel have the names of the plain model."""

from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn

import trainer
from trainer.compress.rewrite import restore
from trainer.errors import ConfigError
from trainer.experiment import Experiment
from trainer.models.wrappers import is_compiled, unwrapped
from trainer.phases import Train

NAMES = ["0.weight", "0.bias", "1.weight", "1.bias"]


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def experiment(model: Any, **settings: Any) -> Experiment:
    data = torch.zeros(8, 3), torch.zeros(8)
    return Experiment(model=model, data=data, phases=[Train(epochs=1)], **settings)


def in_parts() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(3, 4)), nn.DataParallel(nn.Linear(4, 2)))


def wrappers() -> list[nn.Module]:
    return [torch.compile(plain()), nn.DataParallel(torch.compile(plain())), in_parts()]  # type: ignore[list-item]


def test_names_are_those_of_the_plain_model() -> None:
    for model in wrappers():
        assert is_compiled(model)
        assert list(unwrapped(model).state_dict()) == NAMES
    assert not is_compiled(plain())
    (in_place := plain())[0].compile()
    assert is_compiled(in_place)


def test_an_experiment_trains_the_model_in_a_wrapper_compiled() -> None:
    for model in wrappers():
        built = experiment(model)
        assert built.config.compile is True
        assert list(built.build_model().state_dict()) == NAMES
        loaded = cloudpickle.loads(cloudpickle.dumps(built))
        assert list(loaded.build_model().state_dict()) == NAMES
    assert len(model.state_dict()) == 4, "the model itself stays as it is"
    assert isinstance(model[1], nn.DataParallel)  # type: ignore[index]
    options = experiment(wrappers()[0], compile={"backend": "eager"}).config.compile
    assert options == {"backend": "eager"}


def test_a_function_that_returns_a_wrapper_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^model\.0 is a wrapper, OptimizedModule, .*compile=tr"):
        experiment(in_parts).build_model()


def test_weights_of_a_plain_model_load_into_a_wrapper() -> None:
    trained = plain()
    for model in wrappers()[:2]:
        assert restore(model, trained.state_dict()) is model
        assert torch.equal(unwrapped(model)[0].weight, trained[0].weight)


def test_the_inference_engine_takes_the_model_in_a_wrapper() -> None:
    found = trainer.inference.compile(wrappers()[0], plain().state_dict())
    assert found(torch.zeros(1, 3)).shape == (1, 2)
