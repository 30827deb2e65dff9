"""Averages that send less than their values: the mean, the error, and training with them."""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine import bodies
from trainer.compress.install import install
from trainer.compress.parametrize import Packed
from trainer.config import AllReduceConfig, FitConfig
from trainer.engine.loop import fit
from trainer.engine.lossy.base import Lossy, LossyAllReduce, Part
from trainer.engine.lossy.make import check_compression, make_lossy
from trainer.engine.lossy.powersgd import PowerSGD
from trainer.engine.lossy.quantized import BLOCK, Codec, Int8Blocks, Quantized, Rounded
from trainer.engine.lossy.topk import TopK
from trainer.engine.reducer import Reducer
from trainer.engine.ring import RingAllReduce
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.testing.lossy import check_lossy

Ranks = Callable[..., list[Any]]
CODECS: dict[str, Codec] = {
    "int8": Int8Blocks(),
    "bf16": Rounded(torch.bfloat16),
    "fp16": Rounded(torch.float16),
}


def quantized(codec: Codec, part: Part) -> Lossy:
    return Quantized(part.transport, codec)


SETTINGS = [
    {"wire": "int8"},
    {"wire": "int8", "error_feedback": False},
    {"wire": "bf16", "error_feedback": True},
    {"compression": "powersgd", "rank": 1, "whole_steps": 4},
    {"compression": "topk", "fraction": 0.2, "whole_steps": 4},
    {"compression": {"_target_": "tests.engine.test_lossy.Whole"}, "whole_steps": 0},
]


class Whole:
    """A method of a user's own that leaves nothing out."""

    def __init__(self, part: Part) -> None:
        self._all_reduce = part.all_reduce

    @property
    def sent_bytes(self) -> int:
        return self._all_reduce.sent_bytes

    def mean_(self, values: Tensor, error: Tensor | None) -> None:
        self._all_reduce.mean_(values)
        if error is not None:
            error.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def values_of(rank: int, length: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(length, generator=generator) * torch.logspace(-3, 1, length)


METHODS: dict[str, Callable[[Part], Lossy]] = {
    **{name: partial(quantized, codec) for name, codec in CODECS.items()},
    "powersgd": lambda part: PowerSGD(part, rank=2),
    "topk": lambda part: TopK(part, fraction=0.1),
}


@pytest.mark.parametrize("method", METHODS)
def test_contract(method: str) -> None:
    check_lossy(METHODS[method])


def test_contract_of_a_part_without_matrices() -> None:
    """As after pruning, when the surviving weights are a vector."""
    check_lossy(METHODS["powersgd"], shapes=[(300,), (3, 3)], ranks=2)


@pytest.mark.parametrize(("codec", "relative"), [("int8", 1 / 127), ("bf16", 2**-7)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_mean_is_within_two_roundings(
    ranks: Ranks, size: int, codec: str, relative: float
) -> None:
    def body(world: World) -> tuple[Tensor, int]:
        lossy = Quantized(world.transport, CODECS[codec])
        values = values_of(world.rank, 1000)
        lossy.mean_(values, None)
        return values, lossy.sent_bytes

    inputs = [values_of(rank, 1000) for rank in range(size)]
    mean = torch.stack(inputs).mean(0)
    for result, sent in ranks(size, body):
        largest = max(float(one.abs().max()) for one in inputs)
        assert float((result - mean).abs().max()) <= largest * relative
        part = -(-1000 // (size * BLOCK)) * BLOCK
        if codec == "int8":
            assert sent == 2 * (size - 1) * (part + part // BLOCK * 4)


def test_int8_rounds_to_the_nearest_code_of_each_block() -> None:
    codec = Int8Blocks()
    values = torch.cat([torch.linspace(-127, 127, BLOCK), torch.zeros(BLOCK), values_of(0, BLOCK)])
    values[-1] = 1e-42  # too small for a scale of its own, but not alone in its block
    coded = torch.empty(codec.coded_bytes(len(values)), dtype=torch.uint8)
    codec.encode(values, coded)
    decoded = torch.empty_like(values)
    codec.decode(coded, decoded)
    assert torch.equal(decoded[:BLOCK], values[:BLOCK].round())
    assert torch.equal(decoded[BLOCK : 2 * BLOCK], torch.zeros(BLOCK))
    step = values[-BLOCK:].abs().max() / 127
    assert ((decoded - values)[-BLOCK:].abs() <= step * 0.500001).all()
    assert len(coded) == len(values) + 4 * 3


def test_what_is_lost_arrives_later(ranks: Ranks) -> None:
    """The sum of the means over many steps is as exact as a single mean; without, it drifts."""

    def body(world: World) -> list[float]:
        drifts = []
        for feeds_back in (True, False):
            average = LossyAllReduce(Quantized(world.transport, Int8Blocks()), feeds_back)
            total, exact = torch.zeros(500), torch.zeros(500)
            for _ in range(50):
                flat = values_of(world.rank, 500)
                average.mean_(flat)
                total += flat
                exact += (values_of(0, 500) + values_of(1, 500)) / 2
            drifts.append(float((total - exact).abs().max()))
        return drifts

    for with_feedback, without in ranks(2, body):
        assert with_feedback < 0.3
        assert without > 5 * with_feedback


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_leaves_no_trace(ranks: Ranks, bad: float) -> None:
    def body(world: World) -> tuple[Tensor, Tensor]:
        average = LossyAllReduce(Quantized(world.transport, Int8Blocks()), True)
        first, second = values_of(world.rank, 600), values_of(world.rank, 600, 1)
        if world.rank == 1:
            first[7] = bad
        average.mean_(first)
        average.mean_(second)
        return first, second

    for first, second in ranks(2, body):
        assert not first[7].isfinite()
        assert first[BLOCK * 2 :].isfinite().all()
        assert second.isfinite().all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_training_resumes_exactly_and_ranks_agree(ranks: Ranks, settings: dict[str, Any]) -> None:
    """Stop after 7 of 15 steps, give every rank what a checkpoint holds, and continue."""

    def body(world: World) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        run = bodies.runtime(world, bucket_mb=0.0001, **settings)
        cfg = FitConfig(epochs=3, freeze={"0": 1})
        ends, kept = [], {}
        split, model = bodies.problem()
        for step in fit(model, split, cfg, run):
            sent = step.sent_bytes
            if step.step in (3, 5, 7):
                kept[step.step] = copy.deepcopy(
                    ({**step.state(), **step.rank_state()}, model.state_dict())
                )
        ends.append(model.state_dict())
        for start, weights in kept.values():
            split, model = bodies.problem()
            model.load_state_dict(weights)
            for _ in fit(model, split, cfg, run, start=start):
                pass
            ends.append(model.state_dict())
        return *ends, sent

    def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return all(torch.equal(one[key], other[key]) for key in one)

    first, second = ranks(2, body)
    for one, other in zip(first[:-1], second[:-1], strict=True):
        assert equal(first[0], one)
        assert equal(one, other)


def test_training_reaches_the_same_loss(ranks: Ranks) -> None:
    def last_loss(world: World, **settings: Any) -> float:
        ((_, losses, _, _),) = bodies.train(world, {"epochs": 8}, **settings)
        return losses[-1]

    exact = ranks(2, last_loss)[0]
    for settings in SETTINGS:
        lossy = ranks(2, lambda world, s=settings: last_loss(world, **s))
        assert lossy[0] == lossy[1]
        assert abs(lossy[0] - exact) < 0.02


@pytest.mark.parametrize("settings", [{"wire": "int8"}, {"compression": "powersgd"}], ids=str)
def test_steps_are_skipped_and_scaled_anew_on_all_ranks(
    ranks: Ranks, settings: dict[str, Any]
) -> None:
    """The loss scale grows every second step, until gradients overflow and it shrinks."""

    def body(world: World) -> tuple[list[bool], list[float], Tensor]:
        split, model = bodies.problem()
        run = bodies.runtime(world, precision="fp16", **settings)
        state = run.mixed_precision.state()
        run.mixed_precision.load({**state, "scale": 2.0**18, "growth_interval": 2})
        steps = list(fit(model, split, FitConfig(epochs=6), run))
        weights = nn.utils.parameters_to_vector(model.parameters()).detach()
        return [s.applied for s in steps], [s.loss for s in steps], weights

    (applied, losses, weights), (_, _, other) = ranks(2, body)
    assert applied.count(False) > 2
    assert applied.count(True) > 10
    assert torch.equal(weights, other)
    assert losses[-1] < 0.7 * losses[0]


def test_what_is_late_follows_the_loss_scale(ranks: Ranks) -> None:
    def body(world: World) -> Tensor:
        average = LossyAllReduce(Quantized(world.transport, Int8Blocks()), True)
        flat = values_of(world.rank, 300)
        average.mean_(flat)
        late = average.rank_state()["error"].clone()
        average.rescale(0.5)
        return late - 2 * average.rank_state()["error"]

    for difference in ranks(2, body):
        assert not difference.any()


def test_powersgd_is_exact_for_a_gradient_of_its_rank(ranks: Ranks) -> None:
    """The sum of the ranks' gradients is what has to have the rank, once Q has converged."""

    def body(world: World) -> tuple[Tensor, int]:
        all_reduce = RingAllReduce(world.transport, torch.float32)
        shapes = [torch.Size((20, 30)), torch.Size((5,))]
        lossy = PowerSGD(Part(shapes, world.transport, all_reduce), rank=2)
        for _ in range(2):
            before = lossy.sent_bytes
            values = gradient(world.rank)
            lossy.mean_(values, None)
        return values, lossy.sent_bytes - before

    def gradient(rank: int) -> Tensor:
        generator = torch.Generator().manual_seed(rank)
        left = torch.randn(20, 1, generator=generator)
        right = torch.randn(1, 30, generator=generator)
        return torch.cat([(left @ right).flatten(), torch.full((5,), float(rank))])

    for result, sent in ranks(2, body):
        torch.testing.assert_close(result, (gradient(0) + gradient(1)) / 2, rtol=1e-4, atol=1e-5)
        assert sent == 4 * ((20 + 30) * 2 + 5)


def test_powersgd_connects_to_its_neighbours_only(ranks: Ranks) -> None:
    """It averages by all-reduces alone, whereas other methods send tensors to every rank."""

    def body(world: World) -> list[list[str]]:
        connected = []
        for compression in ("powersgd", "topk"):
            parameters = [nn.Parameter(torch.ones(20, 20))]
            config = AllReduceConfig(compression=compression, rank=1, whole_steps=0)
            reducer = Reducer(parameters, world, config)
            parameters[0].grad = torch.ones(20, 20)
            reducer.finish()
            assert bool((parameters[0].grad - 1).abs().max() < 1e-5) == (compression == "powersgd")
            reducer.close()
            connected.append(list(world._others))
        return connected

    assert ranks(9, body) == [[[], ["mesh"]]] * 9


def test_without_parameters_there_is_nothing_to_average() -> None:
    for settings in SETTINGS:
        assert make_lossy([], AllReduceConfig(**settings)) == []


def test_topk_sends_the_largest_values_of_every_rank(ranks: Ranks) -> None:
    def body(world: World) -> tuple[list[float], list[float], int]:
        part = Part(
            [torch.Size((8,))], world.transport, RingAllReduce(world.transport, torch.float32)
        )
        lossy = TopK(part, fraction=0.25)
        values = torch.tensor([[1, -9, 2, 8, 0, 0, 3, 0], [4, 7, 0, 0, -6, 1, 1, 1]][world.rank])
        values, error = values.float(), torch.empty(8)
        lossy.mean_(values, error)
        return values.tolist(), error.tolist(), lossy.sent_bytes

    mean = [0, (7 - 9) / 2, 0, 4, -3, 0, 0, 0]
    errors = [[1, 0, 2, 0, 0, 0, 3, 0], [4, 0, 0, 0, 0, 1, 1, 1]]
    assert ranks(2, body) == [(mean, error, 16) for error in errors]


@pytest.mark.parametrize("packed", [False, True])
def test_the_state_is_that_of_the_last_step_that_all_ranks_finished(
    ranks: Ranks, packed: bool
) -> None:
    """Survivors of an elastic run continue from it, and a replay must find the same."""

    def body(world: World) -> None:
        model = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9))
        if packed:  # a vector of weights beside a matrix
            weight = model[0].weight
            install(model, {"0.weight": Packed(weight, torch.eye(9, dtype=torch.bool))})
        config = AllReduceConfig(bucket_mb=0.0001, compression="powersgd", rank=1, whole_steps=1)
        reducer = Reducer(model.parameters(), world, config)
        for step in range(3):
            if step == 2:
                kept = copy.deepcopy(reducer.state())
                if world.rank == 1:
                    world.close()
            reducer.zero_grad()
            model(torch.ones(1, 9)).sum().backward()
            if step < 2:
                reducer.finish()
            else:
                with pytest.raises(ConnectionError):
                    reducer.finish()
        assert str(reducer.state()) == str(kept)
        reducer.close()

    ranks(2, body)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"_target_": "no.such"}, "allreduce.compression._target_=no.such"),
        ({"_target_": f"{TopK.__module__}.TopK", "share": 1}, "allreduce.compression.share"),
        ({"_target_": f"{TopK.__module__}.TopK"}, "fraction"),
    ],
)
def test_a_class_that_cannot_be_built_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_compression(AllReduceConfig(compression=settings))
