"""Measurements of workers at the end of a trial."""

from collections.abc import Sequence

import pytest
import torch
from torch import nn

from tests.test_resume import config
from trainer.engine.world import World
from trainer.errors import RunError
from trainer.experiment import Experiment
from trainer.hardware.costs import modelled_costs, network_costs
from trainer.messages import Message, PhaseEnded, TrialMeasured
from trainer.worker.run import Start
from trainer.worker.trial import MODELLED, run_trial

NOTHING = {"epochs": 0}
PRUNE = {"_target_": "trainer.phases.Prune", "sparsity": 0.9, "fit": NOTHING}
SHARE = {"_target_": "trainer.phases.Share", "bits": 4, "fit": NOTHING}


def run(
    experiment: Experiment, measures: Sequence[str], start: Start | None = None
) -> list[Message]:
    world = World.single(torch.device("cpu"))
    return list(run_trial(world, experiment, start or Start(0), measures))


def measured(messages: Sequence[Message]) -> dict[str, float]:
    return {m.name: m.value for m in messages if isinstance(m, TrialMeasured)}


def test_only_what_is_asked_for() -> None:
    experiment = config(phases={"prune": PRUNE})
    assert measured(run(experiment, [])) == {}
    messages = run(experiment, ["latency"])
    assert set(measured(messages)) == {"latency"}
    assert measured(messages)["latency"] > 0
    order = [type(m) for m in messages if isinstance(m, TrialMeasured | PhaseEnded)]
    assert order == [TrialMeasured, PhaseEnded]
    # A trial whose phases had all ended before is measured from its weights.
    (ended,) = (m for m in messages if isinstance(m, PhaseEnded))
    assert set(measured(run(experiment, ["latency"], Start(1, weights=ended.weights)))) == {
        "latency"
    }


def test_costs_on_modelled_hardware_fall_with_the_density() -> None:
    found = []
    for sparsity in (0.5, 0.9):
        phases = {"prune": {**PRUNE, "sparsity": sparsity}, "share": SHARE}
        found.append(measured(run(config(phases=phases), ["eie_cycles", "energy", "tpu_cycles"])))
    half, tenth = found
    assert tenth["energy"] < half["energy"]
    assert tenth["eie_cycles"] < half["eie_cycles"]
    assert tenth["tpu_cycles"] == half["tpu_cycles"]  # it does not leave out zeros


def test_a_model_without_shared_values_has_no_eie_cycles() -> None:
    with pytest.raises(RunError, match=r"eie_cycles: the weights are not shared"):
        run(config(phases={"prune": PRUNE}), ["eie_cycles"])


def test_modelled_costs_are_those_of_the_table() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
    with torch.no_grad():
        for weight in (model[0].weight, model[2].weight):
            weight.copy_((weight * 30).round() / 30)
    samples = torch.rand(8, 20)
    costs = network_costs(model, samples)
    found = modelled_costs(MODELLED, model, samples)
    last = costs.stages[-1]
    assert last.eie is not None
    assert found["energy"] == pytest.approx(sum(f.value for f in last.energy.values()))
    assert found["eie_cycles"] == pytest.approx(last.eie.microseconds.value * 800)
    assert found["tpu_cycles"] == pytest.approx(last.tpu.microseconds.value * 700)
