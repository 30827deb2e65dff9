"""Experiments: the stages of their phases, and settings that are refused before the start."""

import copy
import pickle
import threading
from functools import partial
from typing import Any

import cloudpickle
import pytest
import torch
from torch import nn

from tests.experiments import experiment
from trainer.config import DistillConfig, FitConfig
from trainer.errors import ConfigError
from trainer.experiment import Experiment, Stage, check_model
from trainer.phases import Phase, Prune, Retrain, Share, Train

DATA = (torch.zeros(8, 3), torch.zeros(8))
FIT = FitConfig(epochs=1)
TAUGHT = FitConfig(epochs=1, distill=DistillConfig(weight=0.5))
ZEROS = frozenset({"zeros"})
BOTH = frozenset({"zeros", "sharing"})


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.fc = nn.Linear(3, 3)


def of(*phases: Phase, **settings: Any) -> Experiment:
    return Experiment(model=nn.Linear, data=DATA, phases=phases, **settings)


def test_a_stage_ends_with_the_last_phase_that_adds_nothing() -> None:
    whole = of(Train(), Train(), Prune(0.5, epochs=1), Retrain(), Prune(0.9, epochs=1))
    assert whole.stages == [Stage(frozenset(), 1), Stage(ZEROS, 4)]
    keep = Retrain(keep=["zeros", "sharing"])
    shared = of(Train(), Prune(0.5, epochs=1), Retrain(), Share(epochs=1), keep)
    assert shared.stages == [Stage(frozenset(), 0), Stage(ZEROS, 2), Stage(BOTH, 4)]
    assert list(shared.phases) == ["train", "prune", "retrain", "share", "retrain_2"]


def test_without_a_dense_phase_the_initial_weights_are_the_baseline() -> None:
    stages = of(Share(epochs=1)).stages
    assert stages == [Stage(frozenset(), -1), Stage(frozenset({"sharing"}), 0)]


def test_only_phases_after_the_dense_model_have_a_teacher() -> None:
    of(Train(), Prune(0.5, fit=TAUGHT), Share(fit=TAUGHT))
    of(Prune(0.5, fit=TAUGHT), init_from="weights.pt")
    for phases, init_from, name in (
        ((Train(fit=TAUGHT), Prune(0.5, fit=FIT)), None, "train"),
        ((Train(fit=TAUGHT), Prune(0.5, fit=FIT)), "weights.pt", "train"),
        ((Train(), Train(fit=TAUGHT), Prune(0.5, fit=FIT)), None, "train_2"),
        ((Prune(0.5, fit=FIT), Retrain(fit=TAUGHT)), None, "retrain"),
    ):
        with pytest.raises(ConfigError, match=rf"phases\.{name}\.fit\.distill\.weight=0\.5"):
            of(*phases, init_from=init_from)


def test_a_class_that_no_process_can_import_by_its_name_is_built_with_its_arguments() -> None:
    class Net(nn.Linear):
        pass

    made = Experiment(
        model=partial(Net, in_features=3, out_features=2), data=DATA, phases=[Train()]
    )
    model = pickle.loads(cloudpickle.dumps(made)).build_model()
    assert model.weight.shape == (2, 3)


def test_a_model_that_no_file_can_hold_is_refused_before_it_is_trained() -> None:
    model = {"_target_": f"{__name__}.Complex"}
    message = "artifact.make=true: phase: a torch.complex64 tensor .*; set artifact.make=false"
    with pytest.raises(ConfigError, match=message):
        check_model(experiment(model=model, artifact={"make": True}))
    assert check_model(experiment(model=model)) is not None


def test_the_current_process_is_one_worker() -> None:
    assert of(Train(), cluster={"backend": "inline"}).config.cluster.workers == 1
    for settings in ({"workers": 3}, {"cluster": {"backend": "inline", "workers": 3}}):
        with pytest.raises(ConfigError, match=r"workers=3 with cluster\.backend=inline"):
            of(Train(), **{"cluster": {"backend": "inline"}, **settings})


def test_data_are_required() -> None:
    with pytest.raises(ConfigError, match="data is None"):
        Experiment(model=nn.Linear, data=None, phases=[Train()])


def test_workers_get_no_sinks() -> None:
    class Sink:
        lock = threading.Lock()  # has no pickle

    made = of(Train(), logger={"mine": (sink := Sink())})
    sent = pickle.loads(cloudpickle.dumps(made.for_workers()))
    assert (list(made.loggers), list(sent.loggers)) == (["mine"], [])
    assert sent.settings() == made.settings()
    assert copy.copy(made).loggers["mine"].given is sink  # any other copy keeps them
