"""Averages that send less than their values: the mean, the error, and training with them."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine import bodies
from trainer.config import AllReduceConfig, FitConfig
from trainer.engine.loop import fit
from trainer.engine.lossy.base import LossyAllReduce
from trainer.engine.lossy.make import make_lossy
from trainer.engine.lossy.quantized import BLOCK, Codec, Int8Blocks, Quantized, Rounded
from trainer.engine.world import World
from trainer.testing.lossy import check_lossy

Ranks = Callable[..., list[Any]]
CODECS: dict[str, Codec] = {
    "int8": Int8Blocks(),
    "bf16": Rounded(torch.bfloat16),
    "fp16": Rounded(torch.float16),
}
SETTINGS = [
    {"wire": "int8"},
    {"wire": "int8", "error_feedback": False},
    {"wire": "bf16", "error_feedback": True},
]


def values_of(rank: int, length: int, step: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(length, generator=generator) * torch.logspace(-3, 1, length)


@pytest.mark.parametrize("codec", CODECS)
def test_contract(codec: str) -> None:
    check_lossy(lambda world: Quantized(world.transport, CODECS[codec]), length=700)


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


def test_fp16_scales_what_is_late(ranks: Ranks) -> None:
    def body(world: World) -> Tensor:
        average = make_lossy(world.transport, AllReduceConfig(wire="int8"))
        flat = values_of(world.rank, 300)
        average.mean_(flat)
        late = average.rank_state()["error"].clone()
        average.rescale(0.5)
        return late - 2 * average.rank_state()["error"]

    for difference in ranks(2, body):
        assert not difference.any()
