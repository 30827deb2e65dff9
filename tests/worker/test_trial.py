"""Measurements of workers at the end of a trial."""

import torch

from tests.test_resume import config
from trainer.engine.world import World
from trainer.messages import FileEncoded, LatencyMeasured, PhaseEnded
from trainer.worker.run import Start
from trainer.worker.trial import run_trial

PHASES = {"prune": {"_target_": "trainer.phases.Prune", "sparsity": 0.9, "fit": {"epochs": 0}}}


def test_only_what_is_asked_for() -> None:
    world, experiment = World.single(torch.device("cpu")), config(phases=PHASES)
    messages = list(run_trial(world, experiment, Start(0), []))
    assert not any(isinstance(m, FileEncoded | LatencyMeasured) for m in messages)
    messages = list(run_trial(world, experiment, Start(0), ["latency"]))
    (measured,) = [m for m in messages if isinstance(m, LatencyMeasured)]
    assert measured.microseconds > 0
    ended = next(i for i, m in enumerate(messages) if isinstance(m, PhaseEnded))
    assert messages.index(measured) < ended
    assert not any(isinstance(m, FileEncoded) for m in messages)
    # A trial whose phases had all ended before is measured from its weights.
    again = run_trial(world, experiment, Start(1, weights=messages[ended].weights), ["latency"])
    assert any(isinstance(m, LatencyMeasured) for m in again)
