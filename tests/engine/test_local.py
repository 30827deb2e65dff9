"""Local steps with an outer optimizer: the weights, their averages, and resuming."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine import bodies
from trainer.config import FitConfig
from trainer.data.order import global_batches, shard
from trainer.data.split import TensorSplit
from trainer.engine.loop import fit
from trainer.engine.world import World
from trainer.errors import Diverged, RunError

Ranks = Callable[..., list[Any]]
Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    return copy.deepcopy(model.state_dict())


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def by_hand(local_steps: int, epochs: int, outer_lr: float, outer_momentum: float) -> Weights:
    """DiLoCo on two ranks, one after the other in this process, as its paper states it."""
    split, model = bodies.problem(samples=64)
    models = [copy.deepcopy(model) for _ in range(2)]
    inner = [torch.optim.SGD(m.parameters(), lr=0.2, momentum=0.9) for m in models]
    anchor = [p.detach().clone() for p in model.parameters()]
    outer = torch.optim.SGD(anchor, lr=outer_lr, momentum=outer_momentum, nesterov=True)
    for epoch in range(epochs):
        batches = global_batches(len(split), 16, 5, epoch)
        for number, batch in enumerate(batches, start=1):
            for rank in range(2):
                own = shard(batch, rank, 2)
                inner[rank].zero_grad()
                output = models[rank](split.inputs[own])
                nn.functional.cross_entropy(output, split.targets[own]).backward()
                inner[rank].step()
            if number % local_steps == 0 or number == len(batches):
                for index, start in enumerate(anchor):
                    ends = [list(m.parameters())[index].detach() for m in models]
                    start.grad = torch.stack([start - end for end in ends]).mean(0)
                outer.step()
                for m in models:
                    for p, start in zip(m.parameters(), anchor, strict=True):
                        p.data.copy_(start)
    return weights_of(models[0])


@pytest.mark.parametrize("local_steps", [3, 100])
def test_it_is_diloco(ranks: Ranks, local_steps: int) -> None:
    """An average after so many steps, counted from the beginning of each epoch, and at its end."""

    def body(world: World) -> tuple[Weights, list[bool], list[int]]:
        split, model = bodies.problem(samples=64)
        run = bodies.runtime(world, local_steps=local_steps, outer_lr=0.6, outer_momentum=0.8)
        cfg = FitConfig(epochs=2, schedule="constant")
        steps = list(fit(model, split, cfg, run, local_steps=local_steps))
        return weights_of(model), [s.synchronized for s in steps], [s.sent_bytes for s in steps]

    (first, synchronized, sent), (second, _, _) = ranks(2, body)
    assert (
        synchronized
        == ([False, False, True, True] if local_steps == 3 else [False] * 3 + [True]) * 2
    )
    assert equal(first, second)
    for key, value in by_hand(local_steps, 2, 0.6, 0.8).items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)
    dense = 4 * (sum(v.numel() for v in first.values()) + 4)
    assert sent[3] == dense if local_steps == 3 else sent[3] == dense // 4


@pytest.mark.parametrize("wire", ["fp32", "int8"])
def test_a_run_that_resumes_at_an_average_ends_with_the_same_bits(ranks: Ranks, wire: str) -> None:
    optimizer = {"_target_": "torch.optim.AdamW", "lr": 0.01}
    cfg = FitConfig(epochs=3, freeze={"0": 1})

    def body(world: World) -> list[Weights]:
        def start(weights: Weights | None, state: Any) -> tuple[nn.Module, Any]:
            split, model = bodies.problem()
            if weights is not None:
                model.load_state_dict(weights)
            run = bodies.runtime(world, optimizer=optimizer, wire=wire, local_steps=2)
            return model, fit(model, split, cfg, run, start=state, local_steps=2)

        model, steps = start(None, None)
        kept = []
        for step in steps:
            if step.synchronized and step.step in (2, 5, 7, 10):
                state = {**step.state(), **step.rank_state()}
                kept.append((weights_of(model), copy.deepcopy(state)))
        ends = [weights_of(model)]
        for weights, state in kept:
            model, steps = start(weights, state)
            assert len(list(steps)) == 15 - state["step"]
            ends.append(weights_of(model))
        assert len(ends) == 5
        return ends

    first, second = ranks(2, body)
    for one, other in zip(first, second, strict=True):
        assert equal(first[0], one)
        assert equal(one, other)


def test_a_checkpoint_holds_the_optimizer_of_each_rank_once(ranks: Ranks) -> None:
    def body(world: World) -> tuple[Any, Any]:
        split, model = bodies.problem()
        run = bodies.runtime(world, local_steps=2)
        for step in fit(model, split, FitConfig(epochs=1), run, local_steps=2):
            if step.synchronized:
                return copy.deepcopy((step.state(), step.rank_state()))
        raise AssertionError

    (state, first), (_, second) = ranks(2, body)
    assert first == {}  # that of rank 0 is in the state itself
    assert sorted(second) == ["optimizer", "updates"]
    momenta = [s["optimizer"]["state"][0]["momentum_buffer"] for s in (state, second)]
    assert not torch.equal(*momenta)


@pytest.mark.parametrize("broken", ["input", "weights"])
def test_a_loss_that_is_not_finite_ends_all_ranks_at_the_next_average(
    ranks: Ranks, broken: str
) -> None:
    """Rank 1's loss becomes NaN in the second step of the first round of five steps."""

    def body(world: World) -> str:
        split, model = bodies.problem(samples=80)
        inputs = split.inputs.clone()
        batch = global_batches(len(split), 16, 5, 0)[1]
        if broken == "input":
            inputs[shard(batch, 1, 2)[0]] = torch.nan
        data = TensorSplit(inputs, split.targets)
        run = bodies.runtime(world, local_steps=5)
        done = []

        def advance() -> None:
            for step in fit(model, data, FitConfig(epochs=1), run, local_steps=5):
                done.append(step.step)
                if broken == "weights" and step.step == 1 and world.rank == 1:
                    nn.init.constant_(model[0].weight, torch.nan)

        with pytest.raises((Diverged, RunError)) as error:
            advance()
        assert done == [1, 2, 3, 4]
        return str(error.value)

    first, second = ranks(2, body)
    assert first == second
    assert ("the input of train" in first) == (broken == "input")


def test_alone_every_step_is_like_one_without_local_steps() -> None:
    """Nothing is averaged, and a checkpoint needs nothing more."""
    ends = []
    for local_steps in (1, 3):
        split, model = bodies.problem()
        run = bodies.runtime(World.single(torch.device("cpu")), local_steps=local_steps)
        steps = list(fit(model, split, FitConfig(epochs=1), run, local_steps=local_steps))
        assert all(step.synchronized for step in steps)
        assert steps[-1].rank_state() == {}
        assert "reducer" not in steps[-1].state()
        ends.append((weights_of(model), [step.loss for step in steps]))
    assert equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_an_average_covers_the_units_of_loss_of_all_ranks(ranks: Ranks) -> None:
    """Padding is not counted, and the shares of the two ranks hold different amounts of it."""

    def body(world: World) -> list[tuple[float, float]]:
        split, model = bodies.sentences(samples=64)
        run = bodies.runtime(world, local_steps=2)
        steps = list(fit(model, split, FitConfig(epochs=1), run, local_steps=2))
        return [(step.targets, step.loss) for step in steps]

    split, _ = bodies.sentences(samples=64)
    batches = global_batches(len(split), 16, 5, 0)
    counts = [int((split.targets[batch] != -100).sum()) for batch in batches]
    own = [
        [2 * int((split.targets[shard(batch, rank, 2)] != -100).sum()) for batch in batches]
        for rank in range(2)
    ]
    first, second = ranks(2, body)
    assert (first[1], first[3]) == (second[1], second[3])  # the ends of rounds
    for rank, steps in enumerate((first, second)):
        assert [targets for targets, _ in steps] == [
            own[rank][0], counts[1], own[rank][2], counts[3]
        ]  # fmt: skip


def test_a_rank_weights_its_own_units_alike_in_every_step(ranks: Ranks) -> None:
    """Its gradient is the mean over its own units of loss, also in a step that ends a round."""

    def body(world: World) -> Weights:
        split, model = bodies.sentences(samples=32)
        run = bodies.runtime(
            world, local_steps=2, outer_lr=1.0, outer_momentum=0.0,
            optimizer={"_target_": "torch.optim.SGD", "lr": 0.2},
        )  # fmt: skip
        cfg = FitConfig(epochs=1, schedule="constant")
        assert len(list(fit(model, split, cfg, run, local_steps=2))) == 2
        return weights_of(model)

    split, model = bodies.sentences(samples=32)
    ends = []
    for rank in range(2):
        alone = copy.deepcopy(model)
        for batch in global_batches(len(split), 16, 5, 0):
            own = shard(batch, rank, 2)
            alone.zero_grad()
            output = alone(split.inputs[own]).flatten(0, 1)
            nn.functional.cross_entropy(output, split.targets[own].flatten()).backward()
            with torch.no_grad():
                for p in alone.parameters():
                    p -= 0.2 * p.grad
        ends.append(weights_of(alone))
    for result in ranks(2, body):
        for key, value in result.items():
            mean = (ends[0][key] + ends[1][key]) / 2
            torch.testing.assert_close(value, mean, rtol=1e-4, atol=1e-5)


def test_requests_are_answered_at_an_average(ranks: Ranks) -> None:
    def body(world: World) -> list[int]:
        split, model = bodies.problem()
        run = bodies.runtime(world, local_steps=2)
        request = (lambda: 2) if world.rank == 0 else (lambda: 0)
        steps = fit(model, split, FitConfig(epochs=1), run, request=request, local_steps=2)
        return [step.requested for step in steps]

    assert ranks(2, body) == [[0, 2, 0, 2, 2]] * 2
    assert ranks(1, body) == [[2, 2, 2, 2, 2]]
