"""AutoPrune: when a round is kept, when it is undone, and when the search stops."""

import math
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from tests.test_resume import FIT, STEPS, config, run
from trainer.config import FitConfig
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.messages import Checkpoint, PhaseEnded, RoundEnded
from trainer.phases import AutoPrune, Prune
from trainer.phases.auto_prune import LAST_FRACTION, PROBES, expand
from trainer.store.serialization import pack, to_bytes, unpack
from trainer.testing.ranks import run_ranks
from trainer.worker.run import Start, run_phases

WORLD = World.single(torch.device("cpu"))
TRAINING = FitConfig(epochs=1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": "most", "max_drop": 0.1}, "sparsity='most': it must be a number in"),
        ({"max_drop": -0.1}, "max_drop=-0.1: it must be a number of at least 0"),
        ({"max_drop": "2"}, "max_drop='2': it must be a number of at least 0, .* such as \"5%\""),
        ({"max_drop": 0.1, "rounds": 0}, "rounds=0: it must be at least 1"),
        ({"max_drop": 0.1, "fit": FitConfig(epochs=0)}, "auto with fit.epochs=0"),
        ({"max_drop": 0.1, "schedule": "cubic"}, "sparsity=auto with schedule=cubic"),
        ({"max_drop": 0.1, "scope": "global"}, "sparsity=auto with .*scope=global.* scope=layer"),
        ({"max_drop": 0.1, "overrides": {"0": 0.5}}, "overrides={'0': 0.5}.* no overrides"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        expand(Prune(**({"fit": TRAINING, "sparsity": "auto"} | settings)))


class Scripted:
    """A phase whose rounds come to what a script says."""

    def __init__(self, accuracies: list[float], rounds: int = 20, **settings: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(50, 20), nn.Linear(20, 10))
        self.phase = AutoPrune(0.01, rounds, fit=TRAINING, **settings)
        self.left = iter(accuracies)
        self.kept: list[int] = []
        self.states: list[dict[str, torch.Tensor]] = []
        self.measured = 0
        self.dense: nn.Module | None = None

    def measure(self, model: nn.Module) -> Metrics:
        self.measured += 1
        if model is self.dense:
            return Metrics(loss=0.0, values={"accuracy": 0.95})
        # The second layer is worth ten times as much as the first.
        lost = [1 - float(layer.weight.count_nonzero() / layer.weight.numel()) for layer in model]
        return Metrics(loss=lost[0] + 10 * lost[1], values={"accuracy": 0.9})

    def run(self) -> list[Any]:
        records = []
        while True:
            self.phase.plan_round(self.model, WORLD, self.measure, self.dense)
            self.phase.enter(self.model, WORLD)
            self.phase.leave(self.model)
            self.kept.append(sum(int(layer.weight.count_nonzero()) for layer in self.model))
            self.states.append({k: v.clone() for k, v in self.model.state_dict().items()})
            metrics = Metrics(loss=1.0, values={"accuracy": next(self.left)})
            records.append(self.phase.end_round(self.model, WORLD, metrics))
            if records[-1].stopped:
                return records


def test_a_round_is_kept_while_the_accuracy_holds_and_undone_bit_for_bit_when_it_does_not() -> None:
    scripted = Scripted([0.9, 0.895, 0.8] + [0.8] * 20)
    records = scripted.run()
    assert [record.accepted for record in records[:4]] == [True, True, False, False]
    assert scripted.kept[0] == pytest.approx(600, abs=20)
    assert scripted.kept[1] == pytest.approx(300, abs=20)
    assert scripted.kept[3] == scripted.kept[2] < scripted.kept[1]  # trained once more
    assert scripted.kept[2] < scripted.kept[4] < scripted.kept[1]  # a smaller step
    for name, value in scripted.model.state_dict().items():
        assert torch.equal(value, scripted.states[1][name])
    assert "80.00% is below 89.00%" in records[-1].stopped
    assert [r.round for r in records] == list(range(1, len(records) + 1))
    assert len(records) == 2 + 2 * math.ceil(math.log2(math.log(0.5) / math.log(LAST_FRACTION)))


def test_a_round_that_falls_short_may_hold_once_it_is_trained_longer() -> None:
    scripted = Scripted([0.9, 0.8, 0.89, 0.8, 0.8, 0.9, 0.9], rounds=7)
    records = scripted.run()
    assert [record.accepted for record in records] == [1, 0, 1, 0, 0, 1, 1]
    assert [record.extended for record in records] == [0, 1, 0, 1, 0, 0, 0]
    first, short, longer, *_, smaller, larger = scripted.kept
    assert longer == short == pytest.approx(first / 2, abs=20)
    assert smaller == pytest.approx(math.sqrt(0.5) * longer, abs=20)
    assert larger == pytest.approx(smaller / 2, abs=20)  # after success the steps grow again
    for name, value in scripted.model.state_dict().items():
        assert torch.equal(value, scripted.states[-1][name])


def test_the_sensitive_layer_keeps_more() -> None:
    scripted = Scripted([0.9, 0.9, 0.8], rounds=3)
    scripted.run()
    first, second = scripted.model
    assert first.weight.count_nonzero() / 1000 < second.weight.count_nonzero() / 200


def test_it_stops_after_so_many_rounds() -> None:
    records = Scripted([0.9, 0.9, 0.9], rounds=2).run()
    assert len(records) == 2
    assert records[-1].stopped == "all 2 rounds are used up"


def test_it_stops_where_no_layer_may_lose_more() -> None:
    scripted = Scripted([0.9] * 50, rounds=50, min_density=0.2)
    records = scripted.run()
    assert scripted.kept[-1] == pytest.approx(240, abs=2)
    assert "every layer has reached min_density" in records[-1].stopped


def test_it_stops_where_a_round_would_prune_nothing() -> None:
    scripted = Scripted([0.8, 0.8], min_density=1.0)
    (record,) = scripted.run()
    assert scripted.kept == [1200]
    assert record.stopped == "no layer has a weight that a round could prune"


def test_weights_that_were_restored_are_not_measured_again() -> None:
    scripted = Scripted([0.9, 0.8, 0.8, 0.9, 0.8], rounds=5)
    scripted.run()
    assert scripted.measured == 3 * (1 + 2 * len(PROBES))  # the initial one and two accepted ones


def test_the_drop_is_that_of_the_dense_model() -> None:
    scripted = Scripted([0.945, 0.93, 0.92], rounds=3)
    scripted.dense = nn.Linear(1, 1)
    records = scripted.run()
    assert [record.accepted for record in records] == [True, False, False]


def test_the_state_survives_a_checkpoint() -> None:
    scripted = Scripted([0.9] + [0.8] * 20)
    scripted.run()
    search = scripted.phase._search
    loaded = AutoPrune(0.01, 20)
    loaded.load_state(unpack(pack(scripted.phase.state())))
    again = loaded._search
    assert again.history == search.history
    assert again.targets == search.targets
    assert again.curves == search.curves != {}
    assert (again.baseline, again.fraction) == (search.baseline, search.fraction)
    assert all(torch.equal(again.accepted[name], value) for name, value in search.accepted.items())


AUTO = {
    "train": {"_target_": "trainer.phases.Train", "fit": FIT},
    "prune": {
        "_target_": "trainer.phases.Prune",
        "sparsity": "auto",
        "max_drop": 0.15,
        "rounds": 4,
        "fit": FIT,
    },
    "retrain": {"_target_": "trainer.phases.Retrain", "fit": FIT},
}


@pytest.mark.slow
def test_stopped_anywhere_and_resumed_it_ends_in_the_same_bits() -> None:
    cfg = config(phases=AUTO, checkpoint={"every_steps": 1, "every_seconds": None})
    undisturbed, validation, _ = run(cfg)
    messages = [
        m for m in run_phases(WORLD, cfg, Start(0)) if isinstance(m, RoundEnded | PhaseEnded)
    ]
    rounds = [message.record for message in messages if isinstance(message, RoundEnded)]
    record = messages[-2].record
    assert record.name == "prune"
    assert record.rounds == rounds
    assert record.steps == STEPS * len(rounds)
    start, stops = None, 0
    for step in (2, 5, 3, 6, 1):  # each in another round, or in the same one again
        _, _, start = run(cfg, start, (1, step))
        stops += start is not None and start.checkpoint is not None
    weights, again, _ = run(cfg, start)
    assert stops == 5
    assert (weights, again) == (undisturbed, validation)


class Spoil(Prune):
    """Pruning that leaves a model of another accuracy: it always says class 1."""

    def leave(self, model: nn.Module) -> None:
        super().leave(model)
        always(model, 1)


def always(model: nn.Module, label: int) -> None:
    """Let the model answer with one class, whatever it sees."""
    *_, bias = model.parameters()
    with torch.no_grad():
        bias.copy_(1e3 * nn.functional.one_hot(torch.tensor(label), len(bias)))


@pytest.mark.parametrize("resumed", [False, True])
def test_after_another_prune_phase_the_baseline_is_still_the_dense_model(resumed: bool) -> None:
    spoil = {"_target_": "tests.phases.test_auto.Spoil", "sparsity": 0.5, "fit": {"epochs": 0}}
    fit = {"epochs": 1, "max_steps": 2}
    search = {**AUTO["prune"], "rounds": 1, "fit": fit}
    phases = {"train": AUTO["train"], "prune": spoil, "more": search}
    cfg = config(phases=phases, checkpoint={"every_steps": 1, "every_seconds": None})
    cfg.data.settings["validation"] = 100
    model = cfg.build_model()
    always(model, 0)
    dense = to_bytes(model.state_dict())
    always(model, 1)
    start = Start(2, to_bytes(model.state_dict()), None, dense) if resumed else Start(1, dense)
    (kept,) = [m for m in run_phases(WORLD, cfg, start) if isinstance(m, Checkpoint)]
    _, labels = next(iter(cfg.build_data().validation.batches([torch.arange(100)], None)))
    found = [float((labels == label).double().mean()) for label in (0, 1)]
    assert found[0] != found[1]
    assert unpack(kept.content)["phase"]["baseline"] == pytest.approx(found[0])
    assert cfg.dense_phase_needed(2) == 0


def test_a_search_that_may_lose_more_than_the_result_is_refused() -> None:
    settings = {"phases": AUTO, "limits": {"max_accuracy_drop": 0.1}}
    with pytest.raises(ConfigError, match=r"phases\.prune\.max_drop=0\.15.*max_accuracy_drop=0\.1"):
        config(**settings)
    config(**(settings | {"limits": {"max_accuracy_drop": 0.15}}))


@pytest.mark.slow
def test_ranks_agree_and_resume_as_well() -> None:
    cfg = config(phases=AUTO, checkpoint={"every_steps": 1, "every_seconds": None})
    torch.manual_seed(cfg.config.seed)
    begin = Start(0, to_bytes(cfg.build_model().state_dict()))

    def on_two(*arguments: Any) -> Any:
        ends = run_ranks(2, lambda world: run(cfg, *arguments, world))
        return ends[0]

    undisturbed, validation, _ = on_two(begin, None)
    _, _, start = on_two(begin, (1, 4))
    assert start.checkpoint is not None
    assert on_two(start, None) == (undisturbed, validation, None)
    left = safetensors.torch.load(undisturbed)
    assert any(bool((value == 0).any()) for value in left.values())
