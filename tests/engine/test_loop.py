"""The training loop: order of samples, and independence of the number of workers."""

import copy
import dataclasses
import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import Subset

from tests.engine import bodies
from trainer.cluster import open_group
from trainer.config import ClusterConfig, FitConfig
from trainer.data.datasets import DatasetSplit
from trainer.data.order import global_batches
from trainer.data.split import TensorSplit
from trainer.engine.evaluate import evaluate
from trainer.engine.finite import check_samples
from trainer.engine.loop import fit, steps_in
from trainer.engine.objective import Distilled, Supervised
from trainer.engine.optim import OptimizerSpec
from trainer.engine.schedules import lr_factor
from trainer.engine.world import World
from trainer.errors import Diverged, RunError
from trainer.tasks import Classification, Custom

ALONE = World.single(torch.device("cpu"))


def alone(settings, **options):
    (result,) = bodies.train(ALONE, settings, **options)
    return result


def test_it_is_the_loop_that_one_would_write_by_hand():
    split, model = bodies.problem()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, fused=True)
    losses = []
    for epoch in range(3):
        for batch in global_batches(len(split), 16, 5, epoch):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(split.inputs[batch]), split.targets[batch])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    weights, ours, sent, _ = alone({"epochs": 3, "schedule": "constant"})
    assert ours == losses
    assert sent == 0
    for key, value in model.state_dict().items():
        assert torch.equal(weights[key], value)


def test_nothing_to_train():
    split, model = bodies.problem()
    assert list(fit(model, split, FitConfig(epochs=0), bodies.runtime(ALONE))) == []


def test_a_rank_is_busy_while_its_optimizer_is_built():
    """The first one imports torch's compiler, which takes many seconds on a loaded machine."""
    busy = []

    class Watched(torch.optim.SGD):
        def __init__(self, *args, **kwargs):
            busy.append(ALONE.heartbeat.is_busy)
            super().__init__(*args, **kwargs)

    split, model = bodies.problem()
    runtime = dataclasses.replace(
        bodies.runtime(ALONE), optimizer=OptimizerSpec(Watched, {"lr": 0.1, "fused": False})
    )
    list(fit(model, split, FitConfig(epochs=1), runtime))
    assert busy == [True]
    assert not ALONE.heartbeat.is_busy


@pytest.mark.parametrize(
    ("epochs", "max_steps", "expected"), [(2, None, (5, 10)), (2, 7, (5, 7)), (2, 99, (5, 10))]
)
def test_steps(epochs, max_steps, expected):
    assert steps_in(70, 16, FitConfig(epochs=epochs, max_steps=max_steps)) == expected


def test_epochs_end_where_they_should():
    split, model = bodies.problem()
    steps = list(fit(model, split, FitConfig(epochs=2, max_steps=7), bodies.runtime(ALONE)))
    assert [step.step for step in steps if step.epoch_ends] == [5, 7]
    assert [step.samples for step in steps[:5]] == [16, 16, 16, 16, 6]
    assert [step.epoch for step in steps] == [0] * 5 + [1] * 2


def test_a_later_phase_sees_later_permutations():
    seen = []

    class Recorder(TensorSplit):
        def batches(self, order, epoch):
            order = list(order)
            seen.append((epoch, torch.cat(order).tolist()))
            return super().batches(order, epoch)

    split, model = bodies.problem()
    split = Recorder(split.inputs, split.targets)
    for _ in fit(model, split, FitConfig(epochs=1), bodies.runtime(ALONE), epochs_before=4):
        pass
    _, (epoch, order) = seen  # the first sample is read beforehand, to count its targets
    assert epoch == 4
    assert order == torch.cat(global_batches(70, 16, 5, 4)).tolist()


def test_accumulation_changes_nothing_but_rounding():
    whole, losses, _, _ = alone({"epochs": 2})
    pieces, piece_losses, _, _ = alone({"epochs": 2, "accumulate": 3})
    assert piece_losses == pytest.approx(losses, rel=1e-5)
    for key in whole:
        torch.testing.assert_close(pieces[key], whole[key], rtol=1e-4, atol=1e-6)


def test_dropout_depends_on_seed_step_and_rank_alone():
    def once(disturb):
        split, _ = bodies.problem()
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 3))
        losses = []
        for step in fit(model, split, FitConfig(epochs=1), bodies.runtime(ALONE)):
            losses.append(step.loss)
            torch.rand(disturb)
        return losses

    assert once(0) == once(17)


def test_clipping_bounds_the_step():
    split, model = bodies.problem()
    before = [p.detach().clone() for p in model.parameters()]
    run = bodies.runtime(ALONE, optimizer={"_target_": "torch.optim.SGD", "lr": 1.0})
    settings = FitConfig(epochs=1, max_steps=1, clip=1e-3, schedule="constant")
    list(fit(model, split, settings, run))
    moved = torch.cat([(p - b).flatten() for p, b in zip(model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_evaluation_counts_every_sample_once_and_keeps_the_mode():
    split, model = bodies.problem()
    model.train()
    metrics = evaluate(model, split, bodies.runtime(ALONE, batch_size=16))
    logits = model(split.inputs)
    assert metrics.accuracy == (logits.argmax(1) == split.targets).double().mean().item()
    exact = nn.functional.cross_entropy(logits.double(), split.targets).item()
    assert metrics.loss == pytest.approx(exact, rel=1e-6)
    assert model.training


def same_on_all(results):
    """Whether all ranks ended with the same bits in every tensor."""
    first, *others = results
    return all(torch.equal(first[key], other[key]) for other in others for key in first)


@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp16"])
def test_all_ranks_end_with_the_same_bits(ranks, wire):
    def body(world):
        ((weights, _, _, _),) = bodies.train(world, {"epochs": 2}, wire=wire, bucket_mb=1e-4)
        return weights

    assert same_on_all(ranks(3, body))


def test_inf_on_one_rank_is_skipped_by_all(ranks):
    """fp16: the last rank's gradient overflows in one step; loss scaling skips it everywhere."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.full_like(gradient, float("inf"))

    def body(world):
        split, model = bodies.problem()
        run = bodies.runtime(world, precision="fp16")
        applied, weights = [], []
        plain = model.forward
        if world.rank == world.size - 1:
            model.forward = lambda x: Overflow.apply(plain(x))
        for step in fit(model, split, FitConfig(epochs=1, max_steps=3), run):
            model.forward = plain
            applied.append(step.applied)
            weights.append(copy.deepcopy(model.state_dict()))
        return applied, weights

    results = ranks(2, body)
    assert [applied for applied, _ in results] == [[False, True, True]] * 2
    assert same_on_all([weights[-1] for _, weights in results])
    _, untouched = bodies.problem()
    assert same_on_all([untouched.state_dict(), results[0][1][0]])


def test_the_request_of_one_rank_reaches_all_in_the_same_step(ranks):
    def body(world):
        split, model = bodies.problem()
        calls = iter(range(100))

        def request():
            return 2 if world.rank == 0 and next(calls) == 3 else 0

        settings = FitConfig(epochs=2)
        steps = fit(model, split, settings, bodies.runtime(world, wire="bf16"), request=request)
        return [step.requested for step in steps]

    assert ranks(3, body) == [[0, 0, 0, 2, 0, 0, 0, 0, 0, 0]] * 3


def test_a_loss_that_is_nan_on_one_rank_ends_all_in_the_same_step(ranks):
    def body(world):
        split, model = bodies.problem()
        done = []

        def train():
            for step in fit(model, split, FitConfig(epochs=1), bodies.runtime(world)):
                done.append(step.step)
                if step.step == 2 and world.rank == 1:
                    model[0].weight.data.fill_(float("nan"))

        with pytest.raises(Diverged, match=r"step 3 .*learning rate of 0\.1"):
            train()
        return done

    assert ranks(2, body) == [[1, 2], [1, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("size", [1, 3])
def test_an_input_that_is_not_finite_is_named_on_all_ranks(ranks, size, value):
    def body(world):
        split, _ = bodies.problem()
        split.inputs[57, 2] = value
        run = bodies.runtime(world)
        model = nn.Linear(6, 3)  # a tanh would make infinity finite
        world.broadcast(model.parameters())
        with pytest.raises(RunError, match=r"the input of train sample 57 is NaN or infinite"):
            list(fit(model, split, FitConfig(epochs=1), run))
        with pytest.raises(RunError, match=r"the input of test sample 57 is NaN or infinite"):
            evaluate(model, split, run, "test")

    ranks(size, body)


def test_a_target_that_is_not_finite_is_a_hint_and_an_input_the_reason():
    split, _ = bodies.problem()
    targets = torch.zeros(len(split), 3)
    targets[57, 2] = torch.nan
    run = bodies.runtime(World.single(torch.device("cpu")), task=Custom(nn.MSELoss()))
    data = TensorSplit(split.inputs, targets)
    with pytest.raises(
        Diverged, match=r"clip; the target of train sample 57 is NaN or infinite: the"
    ):
        list(fit(nn.Linear(6, 3), data, FitConfig(epochs=1), run))
    split.inputs[60] = torch.nan
    with pytest.raises(RunError, match=r"the input of test sample 60 is NaN or infinite"):
        check_samples(ALONE, data, "test", [torch.tensor([57]), torch.tensor([60])], None)
    signal = TensorSplit(split.inputs * 1j, targets)
    with pytest.raises(RunError, match=r"the input of test sample 60 is NaN or infinite"):
        check_samples(ALONE, signal, "test", [torch.tensor([60])], None)


def test_a_held_out_sample_is_named_by_its_number_in_the_data_set():
    split, model = bodies.problem()
    split.inputs[57] = float("nan")
    pairs = list(zip(split.inputs, split.targets, strict=True))
    held_out = DatasetSplit(Subset(pairs, [3, 57, 4]), seed=0)
    with pytest.raises(RunError, match=r"validation sample 1 \(number 57 of the data set"):
        evaluate(model, held_out, bodies.runtime(ALONE))


def test_a_dataset_can_be_read_again_while_results_of_steps_are_kept():
    split, model = bodies.problem()
    pairs = DatasetSplit(list(zip(split.inputs, split.targets, strict=True)), seed=0)
    run, settings = bodies.runtime(ALONE), FitConfig(epochs=2, max_steps=3)
    kept = list(fit(model, pairs, settings, run))
    assert len(list(fit(model, pairs, settings, run))) == len(kept) == 3


def test_the_model_is_to_blame_where_all_inputs_are_finite():
    split, model = bodies.problem()
    model[0].weight.data.fill_(float("nan"))
    assert math.isnan(evaluate(model, split, bodies.runtime(ALONE)).loss)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_ignored_targets_have_no_say(optimizer):
    """The loop trains as a hand-written one does on the targets that count alone."""
    split, model = bodies.sentences()
    settings = {"_target_": f"torch.optim.{optimizer}", "lr": 0.05}
    by_hand = getattr(torch.optim, optimizer)(model.parameters(), lr=0.05)
    losses = []
    for batch in global_batches(len(split), 16, 5, 0):
        by_hand.zero_grad()
        targets = split.targets[batch]
        counted = targets >= 0
        loss = nn.functional.cross_entropy(model(split.inputs[batch])[counted], targets[counted])
        loss.backward()
        by_hand.step()
        losses.append(loss.item())
    weights, ours, _, metrics = alone(
        {"epochs": 1, "schedule": "constant"}, problem=bodies.sentences, optimizer=settings
    )
    assert ours == pytest.approx(losses, rel=1e-6)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-5, atol=1e-6)
    logits, counted = model(split.inputs), split.targets >= 0
    assert metrics.accuracy == (logits.argmax(-1) == split.targets)[counted].double().mean().item()
    exact = nn.functional.cross_entropy(logits[counted].double(), split.targets[counted]).item()
    assert metrics.loss == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize(("size", "accumulate"), [(1, 4), (2, 1), (3, 2)])
def test_ignored_targets_do_not_depend_on_workers_or_micro_batches(ranks, size, accumulate, weight):
    """Although their shares hold different numbers of targets that count, or none."""

    def train(world, accumulate):
        split, model = bodies.sentences()
        teacher = bodies.sentences()[1]
        objective = Distilled(Classification(), teacher, weight, 2.0) if weight else None
        run = bodies.runtime(world, batch_size=4)
        losses = []
        settings = FitConfig(epochs=1, accumulate=accumulate)
        for step in fit(model, split, settings, run, objective=objective):
            losses.append(step.loss)
        return losses, copy.deepcopy(model.state_dict()), evaluate(model, split, run)

    losses, weights, metrics = train(ALONE, 1)
    results = ranks(size, lambda world: train(world, accumulate))
    for other_losses, other_weights, other_metrics in results:
        assert other_losses == pytest.approx(losses, rel=1e-6, abs=1e-7)
        assert same_on_all([results[0][1], other_weights])
        assert other_metrics.accuracy == metrics.accuracy
        assert other_metrics.loss == pytest.approx(metrics.loss, rel=1e-6)
        for key, value in weights.items():
            torch.testing.assert_close(other_weights[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_without_any_counted_target_changes_nothing(ranks, size, precision):
    def body(world):
        split, model = bodies.sentences(samples=32)
        split.targets[global_batches(32, 16, 5, 0)[1]] = -100
        settings = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
        run = bodies.runtime(world, precision=precision, optimizer=settings)
        steps = fit(model, split, FitConfig(epochs=1), run)
        next(steps)
        before = copy.deepcopy(model.state_dict())
        (step,) = steps
        assert (step.targets, step.applied, step.loss) == (0, False, 0)
        assert same_on_all([before, model.state_dict()])

    ranks(size, body)


def test_a_split_without_any_counted_target_cannot_be_evaluated():
    split, model = bodies.sentences()
    split.targets.fill_(-100)
    with pytest.raises(RunError, match="every target of the test data is -100"):
        evaluate(model, split, bodies.runtime(ALONE), "test")


@pytest.mark.parametrize("size", [1, 2])
def test_weight_decay_leaves_unused_parameters_alone(ranks, size):
    class Partial(nn.Sequential):
        """Its last layer is used only for samples of which the last rank has one."""

        def forward(self, x):
            y = self[0](x)
            return y + self[1](x) if (x[:, 0] > 99).any() else y

    def body(world):
        split, _ = bodies.problem(samples=32)
        split.inputs[global_batches(32, 16, 5, 0)[1][-1], 0] = 100
        model = Partial(nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3))
        world.broadcast(model.parameters())
        before = copy.deepcopy(model.state_dict())
        settings = {"_target_": "torch.optim.AdamW", "lr": 0.1, "weight_decay": 0.5}
        changed = []
        for _ in fit(model, split, FitConfig(epochs=1), bodies.runtime(world, optimizer=settings)):
            after = copy.deepcopy(model.state_dict())
            changed.append(
                [not torch.equal(after[f"{i}.weight"], before[f"{i}.weight"]) for i in range(3)]
            )
        assert changed == [[True, False, False], [True, True, False]]
        return after

    assert same_on_all(ranks(size, body))


def test_skipped_steps_advance_neither_warm_up_nor_schedule():
    """fp16: the first three gradients overflow at the initial loss scale."""
    split, model = bodies.problem()
    run = bodies.runtime(ALONE, precision="fp16")
    run.mixed_precision.load({**run.mixed_precision.state(), "scale": 2.0**20})
    settings = FitConfig(epochs=2, warmup_epochs=1)
    steps = list(fit(model, split, settings, run))
    skipped = sum(not step.applied for step in steps)
    assert skipped >= 3
    assert [step.lr for step in steps[: skipped + 1]] == pytest.approx([0.04] * (skipped + 1))
    lrs = [step.lr for step in steps if step.applied]
    assert lrs == pytest.approx([0.2 * lr_factor(n, 10, 5, settings) for n in range(len(lrs))])


def test_the_loss_scale_and_the_schedule_continue_after_an_interruption():
    def run_with(stop_at):
        split, model = bodies.problem()
        run = bodies.runtime(ALONE, precision="fp16")
        run.mixed_precision.load({**run.mixed_precision.state(), "scale": 2.0**20})
        settings = FitConfig(epochs=2, warmup_epochs=1)
        done = []
        for step in fit(model, split, settings, run):
            done.append((step.lr, step.applied, step.loss))
            if step.step == stop_at:
                state = copy.deepcopy(step.state())
                break
        if stop_at:
            run = bodies.runtime(ALONE, precision="fp16")
            for step in fit(model, split, settings, run, start=state):
                done.append((step.lr, step.applied, step.loss))
        return done, run.mixed_precision.state(), model.state_dict()

    done, scale, weights = run_with(None)
    for stop_at in (2, 6):  # within the skipped steps, and after them
        other, other_scale, other_weights = run_with(stop_at)
        assert (other, other_scale) == (done, scale)
        assert same_on_all([weights, other_weights])


def test_the_loss_scale_of_one_fit_starts_the_next():
    split, model = bodies.problem()
    run = bodies.runtime(ALONE, precision="fp16")
    run.mixed_precision.load({**run.mixed_precision.state(), "scale": 2.0**20})
    first, second = ([s.applied for s in fit(model, split, FitConfig(epochs=2), run)] for _ in "ab")
    assert not all(first)
    assert all(second)


def test_an_fp16_wire_reports_no_divergence_for_a_large_loss(ranks):
    """70000 is beyond the range of fp16; the gradients are small."""

    def body(world):
        split, model = bodies.problem()

        def objective(model, inputs, targets, counted):
            return Supervised(Classification())(model, inputs, targets, counted) + 7e4

        run = bodies.runtime(world, wire="fp16")
        return len(list(fit(model, split, FitConfig(epochs=1), run, objective=objective)))

    assert ranks(2, body) == [5, 5]


@pytest.mark.parametrize("lost_after", [1, 3])
def test_after_the_loss_of_a_rank_everything_is_as_after_the_last_step(ranks, lost_after):
    """Also what the forward pass of the step that failed has changed."""

    def body(world):
        split, _ = bodies.problem()
        with bodies.BUILDING:
            torch.manual_seed(4)
            model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
        model.register_buffer("constant", torch.ones(5))
        steps = fit(model, split, FitConfig(epochs=1), bodies.runtime(world))
        for step in itertools.islice(steps, lost_after):
            before = copy.deepcopy((model.state_dict(), step.state()["optimizer"]["state"]))
        if world.rank == 1:
            world.close()
            return
        with pytest.raises(ConnectionError):
            next(steps)
        after = model.state_dict(), step.state()["optimizer"]["state"]
        assert same_on_all([before[0], after[0]])
        assert all(same_on_all([before[1][n], after[1][n]]) for n in before[1])

    ranks(2, body)


def test_running_statistics_are_those_of_rank_0_when_evaluated(ranks):
    def body(world):
        split, _ = bodies.problem()
        with bodies.BUILDING:
            torch.manual_seed(4)
            model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        run = bodies.runtime(world)
        list(fit(model, split, FitConfig(epochs=1), run))
        before = copy.deepcopy(model.state_dict())
        return before, evaluate(model, split, run), copy.deepcopy(model.state_dict())

    (own0, metrics0, state0), (own1, metrics1, state1) = ranks(2, body)
    assert not torch.equal(own0["1.running_mean"], own1["1.running_mean"])
    assert same_on_all([state0, state1])
    assert metrics0 == metrics1
    split, _ = bodies.problem()
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model.load_state_dict(state0)
    alone_metrics = evaluate(model, split, bodies.runtime(ALONE))
    assert alone_metrics.accuracy == metrics0.accuracy
    assert alone_metrics.loss == pytest.approx(metrics0.loss, rel=1e-6)


def test_nothing_is_drawn_after_the_last_step(monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "trainer.engine.loop.global_batches",
        lambda *args: drawn.append(args) or global_batches(*args),
    )
    split, model = bodies.problem()
    list(fit(model, split, FitConfig(epochs=1000, max_steps=3), bodies.runtime(ALONE)))
    assert len(drawn) == 1


@pytest.fixture(scope="module")
def group(shared_ray):
    opened = open_group(ClusterConfig(workers=3, cpus_per_worker=0.5))
    opened.start()
    yield opened
    opened.stop()


def together(group, settings, **options):
    return group.run(partial(bodies.train, settings=settings, **options))


@pytest.mark.integration
class TestWorkers:
    @pytest.mark.parametrize("algorithm", ["ring", "native"])
    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_three_workers_equal_one(self, group, algorithm, accumulate):
        settings = {"epochs": 3, "accumulate": accumulate}
        weights, losses, _, metrics = alone(settings)
        ((theirs, their_losses, sent, their_metrics),) = together(
            group, settings, algorithm=algorithm, bucket_mb=1e-4
        )
        assert their_losses == pytest.approx(losses, rel=1e-4)
        for key in weights:
            torch.testing.assert_close(theirs[key], weights[key], rtol=1e-4, atol=1e-5)
        assert their_metrics.accuracy == metrics.accuracy
        assert their_metrics.loss == pytest.approx(metrics.loss, rel=1e-4)
        payload = 4 * sum(value.numel() for value in weights.values())
        # The ring sends so small a message to both others at once.
        factor = 2 if algorithm == "ring" else 4 / 3
        assert sent == pytest.approx(factor * payload, rel=0.1)

    def test_a_batch_smaller_than_the_number_of_workers(self, group):
        """70 samples in batches of 3: the last one holds 1, so two workers have nothing to do."""
        settings = {"epochs": 1}
        weights, losses, _, _ = alone(settings, batch_size=3)
        ((theirs, their_losses, _, _),) = together(group, settings, batch_size=3)
        assert their_losses == pytest.approx(losses, rel=1e-4)
        for key in weights:
            torch.testing.assert_close(theirs[key], weights[key], rtol=1e-4, atol=1e-5)
