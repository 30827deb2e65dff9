"""What a phase ends with: averaged weights, its best evaluation, after fewer epochs than set."""

import itertools
import math

import pytest
import torch

from tests.engine import bodies
from tests.engine.conftest import run_ranks
from trainer.config import FitConfig
from trainer.data.split import Splits, TensorSplit
from trainer.engine.average import WeightAverage
from trainer.engine.evaluate import Metrics
from trainer.engine.loop import fit
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.experiment import Experiment, initial_weights
from trainer.messages import Checkpoint, EpochEnded, Handover, Notice, PhaseEnded
from trainer.phases import AutoPrune, Prune, Retrain, Share, Train
from trainer.phases.entropy import EntropyPenalty
from trainer.store.serialization import from_bytes
from trainer.worker.run import Start, run_phases
from trainer.worker.selection import Selection

ALONE = World.single(torch.device("cpu"))
ALL = FitConfig(epochs=8, lr=2.0, schedule="constant", ema=0.7, patience=2, keep_best=True)


def experiment(*phases):
    split, model = bodies.problem()
    return Experiment(
        model=model,
        data=Splits(split, split, split),
        phases=phases,
        optimizer={"_target_": "torch.optim.SGD", "lr": 0.2, "momentum": 0.9},
        batch_size=16,
        seed=5,
        workers=1,
        cluster={"backend": "inline"},
        checkpoint={"every_steps": 1, "every_seconds": None},
    )


def initial(cfg):
    return Start(0, initial_weights(cfg, None))


def messages(cfg, world=ALONE, start=None):
    return list(run_phases(world, cfg, start or initial(cfg)))


def of(kind, found):
    return [message for message in found if isinstance(message, kind)]


def weights(found):
    return [from_bytes(message.weights)[0] for message in of(PhaseEnded, found)]


def test_a_run_is_not_resumed_with_other_data():
    cfg = experiment(Train(epochs=2))
    checkpoint = of(Checkpoint, messages(cfg))[2]
    start = Start(0, initial_weights(cfg, None), checkpoint.content)
    split, model = bodies.problem()
    train = TensorSplit(split.inputs[:40], split.targets[:40])
    other = Experiment(model=model, data=Splits(train, split, split), phases=[Train(epochs=2)])
    with pytest.raises(ConfigError, match="the training set has 40 samples, but 70 when the run"):
        messages(other, start=start)


def test_a_phase_ends_with_the_average_of_its_weights():
    split, model = bodies.problem()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    steps = fit(model, split, FitConfig(epochs=3), bodies.runtime(ALONE))
    for n, _ in enumerate(steps):
        decay = min(0.5, (1 + n) / (10 + n))
        for name, value in model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    (found,) = weights(messages(experiment(Train(fit=FitConfig(epochs=3, ema=0.5)))))
    assert found.keys() == average.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, average[name])
        assert not torch.equal(value, model.state_dict()[name])


def test_the_average_keeps_zeros_and_shared_values():
    phases = Train(epochs=1), Prune(0.5), Retrain(fit=ALL), Share(bits=2, fit=ALL)
    _, pruned, retrained, shared = weights(messages(experiment(*phases)))
    for name in ("0.weight", "2.weight"):
        assert torch.equal(retrained[name] == 0, pruned[name] == 0)
        assert not torch.equal(retrained[name], pruned[name])
        assert torch.equal(shared[name] == 0, pruned[name] == 0)
        assert shared[name].unique().numel() <= 5


def test_within_a_block_the_model_has_the_average():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).bfloat16()
    average = WeightAverage(model, 0.999)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
        model[1].running_mean.add_(1)
    average.update()
    with average.applied():
        torch.testing.assert_close(model[0].weight, before + 0.9)
        torch.testing.assert_close(
            model[1].running_mean.float(), torch.full((2,), 0.9), rtol=0.01, atol=0
        )
    assert torch.equal(model[0].weight, before + 1)


def test_training_ends_early_with_the_best_weights_on_all_ranks():
    cfg = experiment(Train(fit=ALL))
    found = messages(cfg)
    epochs = of(EpochEnded, found)
    (ended,), (notice,) = of(PhaseEnded, found), of(Notice, found)
    assert len(epochs) == 6
    values = [epoch.metrics["accuracy"] for epoch in epochs[:-1]]  # the last one is of the result
    assert ended.record.accuracy == max(values)
    assert ended.record.steps == 5 * len(epochs)
    best = 1 + values.index(max(values))
    assert notice.text == (
        f"phase train: stopped after epoch {len(epochs)} of 8: accuracy has not improved since "
        f"epoch {best}; continues with the weights of epoch {best} (accuracy {max(values):.2%})"
    )
    for other in run_ranks(2, lambda world: messages(cfg, world)):
        assert of(Notice, other) == [notice]
        assert of(PhaseEnded, other)[0].record.loss == pytest.approx(ended.record.loss, rel=1e-4)


def test_the_last_evaluation_may_be_the_best():
    found = messages(experiment(Train(fit=FitConfig(epochs=3, lr=0.05, keep_best=True))))
    plain = messages(experiment(Train(fit=FitConfig(epochs=3, lr=0.05))))
    assert of(Notice, found) == []
    assert of(PhaseEnded, found)[0].weights == of(PhaseEnded, plain)[0].weights


@pytest.mark.parametrize(
    "phase", [Train(fit=ALL), AutoPrune(max_drop=0.5, rounds=2, fit=ALL)], ids=["train", "rounds"]
)
def test_a_resumed_phase_ends_in_the_same_bits(phase):
    cfg = experiment(Train(epochs=1), phase)
    undisturbed = messages(cfg)
    first, end = of(PhaseEnded, undisturbed)
    for checkpoint in of(Checkpoint, undisturbed)[4::11]:
        start = Start(checkpoint.phase, first.weights, checkpoint.content, first.weights)
        if checkpoint.phase == 1:
            (again,) = of(PhaseEnded, messages(cfg, start=start))
            assert again.weights == end.weights
            assert again.record.steps == end.record.steps


def test_a_phase_that_another_group_continues_ends_in_the_same_bits():
    cfg = experiment(Train(fit=ALL))
    undisturbed = messages(cfg)
    (end,) = of(PhaseEnded, undisturbed)
    for step, stage in itertools.product((9, 10, end.record.steps), (0, 1)):
        world = World.single(torch.device("cpu"))
        left = list(run_phases(world, cfg, initial(cfg), leave_at=(0, step, stage)))
        (world.kept,) = of(Handover, left)
        (again,) = of(PhaseEnded, run_phases(world, cfg, initial(cfg), continues=True))
        assert again.weights == end.weights


@pytest.mark.parametrize(
    ("direction", "values", "over", "best"),
    [
        ("maximize", [0.5, 0.6, 0.55, 0.6, 0.7], 3, 1),
        ("minimize", [0.5, 0.6, 0.4, 0.4, 0.4], 4, 2),
        ("maximize", [0.5, 0.505, 0.509, 0.6], 2, 2),
        ("maximize", [math.nan, 0.1, math.nan, math.nan], 3, 1),
    ],
)
def test_what_counts_as_better(direction, values, over, best):
    selection = Selection(FitConfig(epochs=9, patience=2, min_delta=0.01))
    model = torch.nn.Linear(1, 1)
    for epoch, value in enumerate(values):
        metrics = Metrics(1.0, {"accuracy": value}, direction)
        assert selection.add(epoch, metrics, model) == (epoch == over)
        assert selection.add(epoch, metrics, model) == (epoch == over)
        if epoch == over:
            break
    assert selection.epoch == best


def test_a_metric_that_is_always_nan_ends_a_training_too():
    selection = Selection(FitConfig(epochs=9, patience=2))
    nothing = Metrics(1.0, {"accuracy": math.nan}, "maximize")
    assert not selection.add(0, nothing, torch.nn.Linear(1, 1))
    assert selection.add(1, nothing, torch.nn.Linear(1, 1))
    said = "stopped after epoch 2 of 9: accuracy was NaN in every epoch"
    assert selection.notice(1, True, "accuracy") == said


def test_wrong_settings_are_refused():
    for settings, said in [
        ({"ema": 1.0}, r"fit\.ema=1\.0: it must be above 0 and below 1"),
        ({"patience": 0}, r"fit\.patience=0: it must be at least 1"),
        ({"patience": 1, "min_delta": -1}, r"fit\.min_delta=-1"),
        ({"min_delta": 0.1}, r"fit\.min_delta=0\.1 without fit\.patience"),
    ]:
        with pytest.raises(ConfigError, match=said):
            FitConfig(epochs=1, **settings)
    best = FitConfig(epochs=1, keep_best=True)
    with pytest.raises(ConfigError, match=r"fit\.keep_best=true: prune compresses further while"):
        Prune(0.5, schedule="cubic", fit=best)
    with pytest.raises(ConfigError, match=r"fit\.patience=3: entropy compresses further while"):
        EntropyPenalty(fit=FitConfig(epochs=1, patience=3))
    assert Prune(0.5, fit=best).fit.keep_best
