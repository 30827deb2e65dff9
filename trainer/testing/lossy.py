"""The contract of averages that send less than their values: `trainer.engine.lossy.base.Lossy`."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.engine.lossy.base import Lossy, Part
from trainer.engine.ring import RingAllReduce
from trainer.engine.world import World
from trainer.testing.ranks import run_ranks


def check_lossy(
    build: Callable[[Part], Lossy],
    shapes: Sequence[Sequence[int]] = ((40, 30), (40,), (8, 4, 3, 3)),
    ranks: int = 3,
) -> None:
    """Check an implementation in `ranks` threads.

    Args:
        build: Returns an object of the class, such as the class itself.
        shapes: Of the gradients that it averages.
        ranks: Size of the group.

    Raises:
        AssertionError: A rule of `Lossy` is broken.
    """

    sizes = [torch.Size(shape) for shape in shapes]
    length = sum(size.numel() for size in sizes)

    def new(world: World) -> Lossy:
        all_reduce = RingAllReduce(world.transport, torch.float32)
        return build(Part(sizes, world.transport, all_reduce))

    def body(world: World) -> list[tuple[Tensor, Tensor, Tensor]]:
        lossy, other = new(world), new(world)
        steps = []
        for step in range(4):
            generator = torch.Generator().manual_seed(100 * step + world.rank)
            values = torch.randn(length, generator=generator)
            result, error = values.clone(), torch.full_like(values, torch.nan)
            if step == 2:
                other.load_state_dict(copy.deepcopy(lossy.state_dict()))
            sent = lossy.sent_bytes
            lossy.mean_(result, error)
            assert lossy.sent_bytes > sent, "sent_bytes does not count what is sent"
            steps.append((values, result, error))
            if step >= 2:
                again = values.clone()
                other.mean_(again, None)
                assert torch.equal(again, result), "load_state_dict continues with other values"
        for bad in (torch.nan, torch.inf):
            values = torch.ones(length)
            if world.rank == ranks - 1:
                values[length // 2] = bad
            lossy.mean_(values, torch.empty_like(values))
            assert not bool(values.isfinite().all()), f"a value of {bad} does not reach all ranks"
        values = torch.ones(length)
        lossy.mean_(values, torch.empty_like(values))
        assert bool(values.isfinite().all()), "a step that is not finite affects the next one"
        return steps

    for step in zip(*run_ranks(ranks, body), strict=True):
        all_values, results, errors = (torch.stack(column) for column in zip(*step, strict=True))
        for result in results[1:]:
            assert torch.equal(result, results[0]), "the ranks have different results"
        late = (all_values - errors).mean(0)
        assert torch.allclose(late, results[0], rtol=1e-4, atol=1e-5), (
            "the mean of `values - error` over the ranks is not the result"
        )
