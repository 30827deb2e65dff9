"""Phases that choose a setting by trying themselves, training included."""

import re
import weakref

import pytest
import torch

from tests.engine.conftest import run_ranks
from trainer.data.split import Splits, TensorSplit
from trainer.engine.world import World
from trainer.experiment import Experiment, initial_weights
from trainer.messages import Notice, PhaseEnded, RunStopped
from trainer.models.copying import copy_model
from trainer.phases import StructuredPrune, Train
from trainer.testing import ExampleNet
from trainer.worker.run import Start, run_phases

ALONE = World.single(torch.device("cpu"))


def experiment(**settings):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(64) % 4
    inputs = torch.randn(64, 2, 6, 6, generator=generator)
    inputs[:, 0, :3] += targets[:, None, None]
    split = TensorSplit(inputs, targets)
    return Experiment(
        model=ExampleNet,
        data=Splits(split, split, split),
        phases=[Train(epochs=12), StructuredPrune("auto", max_drop=0.15, epochs=2)],
        optimizer={"_target_": "torch.optim.Adam", "lr": 0.01},
        batch_size=16,
        workers=1,
        cluster={"backend": "inline"},
        **settings,
    )


def messages(cfg, world=ALONE, start=None):
    return list(run_phases(world, cfg, start or Start(0, initial_weights(cfg, None))))


def said(found):
    return [message.text for message in found if isinstance(message, Notice)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_phase_ends_as_the_best_of_its_trials(precision):
    found = messages(experiment(precision=precision))
    dense, narrow = (message.record for message in found if isinstance(message, PhaseEnded))
    *trials, chosen = said(found)
    assert len(trials) >= 4
    assert all("phase structured_prune: trying " in trial for trial in trials)
    assert chosen in [trial.replace("trying ", "") for trial in trials]
    accuracy = f"{narrow.metrics['accuracy']:.2%}"
    limit = f"{dense.metrics['accuracy'] - 0.15:.2%}"
    assert chosen.endswith(f"accuracy {accuracy} after training, the limit is {limit}")
    assert narrow.metrics["accuracy"] >= dense.metrics["accuracy"] - 0.15
    assert narrow.parameters < dense.parameters
    removed = [int(re.search(r"(\d+) of \d+ units", trial)[1]) for trial in trials]
    assert max(removed) > min(removed)


def test_a_trial_is_released_before_the_next_one(monkeypatch):
    made = []

    def copied(model):
        assert all(trial() is None for trial in made)
        trial = copy_model(model)
        made.append(weakref.ref(trial))
        return trial

    monkeypatch.setattr("trainer.worker.phase.copy_model", copied)
    found = messages(experiment())
    assert len(made) == sum("trying" in text for text in said(found)) >= 4


def test_two_workers_try_the_same():
    cfg = experiment()
    found = run_ranks(2, lambda world: messages(cfg, world))
    assert said(found[0]) == said(found[1])
    assert any("trying" in text for text in said(found[0]))
    ends = [[m.record.metrics for m in ms if isinstance(m, PhaseEnded)] for ms in found]
    assert ends[0] == ends[1]


def test_stopped_within_a_trial_and_resumed_it_ends_in_the_same_bits():
    cfg, world = experiment(), World.single(torch.device("cpu"))
    undisturbed = messages(cfg)
    first, end = (m for m in undisturbed if isinstance(m, PhaseEnded))
    stopped = []
    for message in run_phases(world, cfg, Start(0, initial_weights(cfg, None))):
        stopped.append(message)
        if isinstance(message, Notice) and "trying" in message.text:
            world.stop.set()
    assert isinstance(stopped[-1], RunStopped)
    assert sum("trying" in text for text in said(stopped)) == 1
    resumed = messages(cfg, start=Start(1, first.weights, None, first.weights))
    assert resumed[-1].weights == end.weights
