"""Averaged gradients compared with those of one process, and failures."""

import functools
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

from trainer.config import AllReduceConfig
from trainer.engine.links import SharedLink
from trainer.engine.reducer import Reducer
from trainer.engine.ring import RingAllReduce
from trainer.engine.world import World

CPU = torch.device("cpu")
Ranks = Callable[..., list[Any]]
SMALL = AllReduceConfig(bucket_mb=0.001)  # several buckets, of about 256 values


generator_in_use = threading.Lock()


def network() -> nn.Sequential:
    with generator_in_use, torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 40), nn.Linear(40, 3)
        )


def images(rank: int, count: int = 4) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.Generator().manual_seed(rank))


def loss_of(model: nn.Module, inputs: Tensor) -> Tensor:
    loss: Tensor = model(inputs).square().mean()
    return loss


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def expected_mean(model: nn.Module, size: int) -> list[Tensor]:
    """The mean of the ranks' gradients, one after the other in this process."""
    sums = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters()]
    for rank in range(size):
        model.zero_grad()
        loss_of(model, images(rank)).backward()
        for total, gradient in zip(sums, gradients(model), strict=True):
            total += gradient
    return [total / size for total in sums]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = 1e-6) -> None:
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@pytest.mark.parametrize(("wire", "tolerance"), [("fp32", 1e-6), ("bf16", 0.03), ("fp16", 0.003)])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.slow
def test_gradients_are_the_mean_on_all_ranks(
    ranks: Ranks, size: int, wire: str, tolerance: float, algorithm: str
) -> None:
    config = AllReduceConfig(algorithm=algorithm, wire=wire, bucket_mb=0.001)

    def body(world: World) -> list[Tensor]:
        model = network()
        reducer = Reducer(model.parameters(), world, config)
        for _ in range(2):  # the second step starts from the first one's views
            reducer.zero_grad()
            reducer.arm()
            loss_of(model, images(world.rank)).backward()
            reducer.finish()
        reducer.close()
        return gradients(model)

    results = ranks(size, body)
    assert_close(results[0], expected_mean(network(), size), tolerance)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_micro_batches_add_up(ranks: Ranks) -> None:
    def body(world: World) -> tuple[list[Tensor], int]:
        model = network()
        reducer = Reducer(model.parameters(), world, SMALL)
        reducer.zero_grad()
        micro = images(world.rank, count=6).split(2)
        for number, inputs in enumerate(micro, start=1):
            if number == len(micro):
                reducer.arm()
            (loss_of(model, inputs) / len(micro)).backward()
        reducer.finish()
        reducer.close()
        return gradients(model), reducer.sent_bytes

    reference = network()
    for rank in range(2):
        (loss_of(reference, images(rank, count=6)) / 2).backward()
    for result, sent_bytes in ranks(2, body):
        assert_close(result, gradients(reference))
        assert sent_bytes == 4 * (sum(p.numel() for p in reference.parameters()) + 1)


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_a_missing_gradient_counts_as_zero_unless_all_miss_it(
    ranks: Ranks, wire: str, algorithm: str
) -> None:
    """A parameter that is unused on one rank, on all, or in the whole of an empty share."""
    config = AllReduceConfig(bucket_mb=0.001, wire=wire, algorithm=algorithm)

    def body(world: World) -> list[list[float | None]]:
        both, one, none = (nn.Parameter(torch.ones(300)) for _ in range(3))
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        reducer = Reducer([both, one, none, frozen], world, config)
        results = []
        for step in range(2):
            reducer.zero_grad()
            reducer.arm()
            if step == 0:
                used = both.sum() + (one.sum() if world.rank == 0 else 0)
                used.backward()
            elif world.rank == 1:
                (3 * both.sum()).backward()
            reducer.finish()
            results.append(
                [None if p.grad is None else p.grad.unique().item() for p in (both, one, none)]
            )
            assert frozen.grad is None
        reducer.close()
        return results

    assert ranks(2, body) == [[[1, 0.5, None], [1.5, None, None]]] * 2
    assert ranks(1, body) == [[[1, 1, None], [None, None, None]]]


def test_gradients_of_earlier_micro_batches_are_not_lost(ranks: Ranks) -> None:
    """A parameter that only the first micro-batch used is sent as well."""

    def body(world: World) -> list[float]:
        a, b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        reducer = Reducer([a, b], world, SMALL)
        reducer.zero_grad()
        (a * (world.rank + 1)).backward()
        reducer.arm()
        b.backward()
        reducer.finish()
        reducer.close()
        return [a.grad.item(), b.grad.item()]

    assert ranks(2, body) == [[1.5, 1.0]] * 2


def test_strides_are_those_of_the_parameters(ranks: Ranks) -> None:
    def body(world: World) -> None:
        model = network().to(memory_format=torch.channels_last)
        reducer = Reducer(model.parameters(), world, AllReduceConfig())
        reducer.arm()
        loss_of(model, images(world.rank)).backward()
        reducer.finish()
        reducer.close()
        for p in model.parameters():
            assert p.grad.stride() == p.stride()
        assert_close(gradients(model), expected_mean(network(), 2))

    ranks(2, body)


def test_gradients_can_be_clipped_and_stepped_on(ranks: Ranks) -> None:
    def body(world: World) -> Tensor:
        model = network()
        reducer = Reducer(model.parameters(), world, SMALL)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True)
        for _ in range(3):
            reducer.zero_grad()
            reducer.arm()
            loss_of(model, images(world.rank)).backward()
            reducer.finish()
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            assert abs(sum(g.square().sum() for g in gradients(model)) ** 0.5 - 1e-3) < 1e-6
            optimizer.step()
        reducer.close()
        return nn.utils.parameters_to_vector(model.parameters())

    first, second = ranks(2, body)
    assert torch.equal(first, second)
    assert not torch.equal(first, nn.utils.parameters_to_vector(network().parameters()))


@pytest.mark.parametrize("wire", ["fp32", "bf16", "fp16"])
def test_extras_are_averaged_along_in_float32(ranks: Ranks, wire: str) -> None:
    """70001 has more bits than bf16, and is beyond the range of fp16."""

    def body(world: World) -> list[list[float]]:
        parameter = nn.Parameter(torch.ones(3))
        half = nn.Parameter(torch.ones(3, dtype=torch.float16))
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        results = []
        for parameters in ([parameter], [half], [half, parameter], [frozen]):
            config = AllReduceConfig(bucket_mb=0.001, wire=wire)
            reducer = Reducer(parameters, world, config, extras=2)
            for _ in range(2):
                reducer.zero_grad()
                reducer.extra[0], reducer.extra[1] = world.rank, 70001
                reducer.arm()
                if parameters[0].requires_grad:
                    sum(p.float().sum() for p in parameters).backward()
                reducer.finish()
                results.append(reducer.extra.tolist())
            reducer.close()
        return results

    for size in (1, 2, 3):
        assert ranks(size, body) == [[[(size - 1) / 2, 70001.0]] * 8] * size


def test_types_are_kept_apart(ranks: Ranks) -> None:
    def body(world: World) -> list[tuple[torch.dtype, float]]:
        types = (torch.float32, torch.bfloat16, torch.float32, torch.float64)
        parameters = [nn.Parameter(torch.ones(3, dtype=dtype)) for dtype in types]
        reducer = Reducer(parameters, world, AllReduceConfig())
        reducer.arm()
        sum((p * world.rank).double().sum() for p in parameters).backward()
        reducer.finish()
        reducer.close()
        return [(p.grad.dtype, p.grad.unique().item()) for p in parameters]

    types = (torch.float32, torch.bfloat16, torch.float32, torch.float64)
    assert ranks(2, body) == [[(dtype, 0.5) for dtype in types]] * 2


def last_gradient_within_backward(
    world: World, length: int, config: AllReduceConfig, tries: int
) -> float:
    """What the last layer's gradient is while the first layer has none; its mean is 0.5.

    Waits until it is the mean, at most `tries` times 10 ms.
    """
    first, last = nn.Parameter(torch.ones(length)), nn.Parameter(torch.ones(length))
    seen: list[float] = []

    class Between(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            for _ in range(tries):
                if last.grad is not None and last.grad[0] == 0.5:
                    break
                time.sleep(0.01)
            seen.append(last.grad[0].item())
            return gradient

    reducer = Reducer([first, last], world, config)
    reducer.arm()
    (Between.apply(first) + last * world.rank).sum().backward()
    reducer.finish()
    assert last.grad.unique().tolist() == [0.5]
    reducer.close()
    return seen[0]


def test_buckets_leave_in_order_while_backward_runs(ranks: Ranks) -> None:
    """The last layer's bucket is averaged before the first layer has its gradient."""
    body = functools.partial(last_gradient_within_backward, length=300, config=SMALL, tries=1000)
    assert ranks(2, body) == [0.5, 0.5]


@pytest.mark.parametrize(("quick", "seen"), [(True, [0.0, 1.0]), (False, [0.5, 0.5])])
def test_small_buckets_leave_together_between_ranks_of_one_host(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, quick: bool, seen: list[float]
) -> None:
    """Two buckets of 256 KiB: with another host, the first is sent while backward runs."""
    monkeypatch.setattr(SharedLink, "quick", quick)
    body = functools.partial(
        last_gradient_within_backward,
        length=64 * 1024,
        config=AllReduceConfig(),
        tries=5 if quick else 1000,
    )
    assert ranks(2, body) == seen


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 8),  # an eighth of all
        ({"bucket_mb": 0.25}, 32),
        ({"wire": "int8"}, 1),  # its error would depend on the size of the buckets
    ],
)
def test_a_small_model_has_several_buckets(
    ranks: Ranks, settings: dict[str, Any], count: int
) -> None:
    """64 parameters of 128 KiB."""

    def body(world: World) -> int:
        parameters = [nn.Parameter(torch.ones(32 * 1024)) for _ in range(64)]
        reducer = Reducer(parameters, world, AllReduceConfig(**settings))
        sizes = [len(bucket.parameters) for bucket in reducer._buckets if bucket.parameters]
        reducer.close()
        assert sum(sizes) == 64
        return len(sizes)

    assert ranks(2, body) == [count, count]


@pytest.mark.parametrize("wire", ["fp32", "bf16"])
def test_a_large_parameter_is_sent_in_pieces(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, wire: str
) -> None:
    """At most 262 values at a time; nothing else waits for them, and the extras come last."""
    lengths: dict[str, list[int]] = {}
    original = RingAllReduce.mean_

    def recorded(ring: RingAllReduce, flat: Tensor) -> None:
        lengths.setdefault(threading.current_thread().name, []).append(len(flat))
        original(ring, flat)

    monkeypatch.setattr(RingAllReduce, "mean_", recorded)

    def body(world: World) -> list[Tensor]:
        large, small = nn.Parameter(torch.ones(10, 100)), nn.Parameter(torch.ones(4))
        reducer = Reducer(
            [large, small], world, AllReduceConfig(bucket_mb=0.001, wire=wire), extras=1
        )
        reducer._sender._thread.name = f"rank {world.rank}"
        reducer.extra.fill_(world.rank)
        reducer.arm()
        ((large * torch.arange(1000.0).view(10, 100)).sum() * world.rank + small.sum()).backward()
        reducer.finish()
        reducer.close()
        return [large.grad, small.grad, reducer.extra]

    for large, small, extra in ranks(2, body):
        mean = torch.arange(1000.0) / 2
        torch.testing.assert_close(large.view(-1), mean, rtol=2.0**-8, atol=0)
        assert small.unique().tolist() == [1.0]
        assert extra.tolist() == [0.5]
    pieces = [4, 251, 251, 250, 250] if wire == "fp32" else [4, 250, 250, 250, 250, 2]
    assert lengths == {"rank 0": pieces, "rank 1": pieces}


def test_a_second_backward_after_arming_is_refused(ranks: Ranks) -> None:
    def body(world: World) -> None:
        parameter = nn.Parameter(torch.ones(3))
        reducer = Reducer([parameter], world, SMALL)
        reducer.arm()
        parameter.sum().backward()
        with pytest.raises(RuntimeError, match=r"a second backward pass after Reducer\.arm"):
            parameter.sum().backward()
        reducer.finish()
        reducer.close()

    ranks(2, body)


def test_what_cannot_be_averaged_is_refused(ranks: Ranks) -> None:
    def body(world: World) -> None:
        with pytest.raises(ValueError, match=r"shape \(3,\) is on meta, its worker on cpu"):
            Reducer([nn.Parameter(torch.ones(3, device="meta"))], world, SMALL)
        with pytest.raises(ValueError, match=r"torch\.complex64"):
            Reducer([nn.Parameter(torch.ones(3, dtype=torch.complex64))], world, SMALL)

    ranks(2, body)


@pytest.mark.parametrize("size", [1, 2])
def test_sparse_gradients_become_dense(ranks: Ranks, size: int) -> None:
    def body(world: World) -> list[list[float]]:
        embedding = nn.Embedding(4, 2, sparse=True)
        reducer = Reducer(embedding.parameters(), world, SMALL)
        for _ in range(2):  # the second step starts from the first one's views
            reducer.zero_grad()
            embedding(torch.tensor([1, 1])).sum().backward()
            reducer.arm()
            embedding(torch.tensor([2 + world.rank])).sum().backward()
            reducer.finish()
        reducer.close()
        gradient = embedding.weight.grad
        assert gradient is not None
        assert gradient.layout == torch.strided
        return gradient.mean(1).tolist()

    expected = {1: [0.0, 2.0, 1.0, 0.0], 2: [0.0, 2.0, 0.5, 0.5]}
    assert ranks(size, body) == [expected[size]] * size


def test_ranks_with_different_models_are_reported(ranks: Ranks) -> None:
    def body(world: World) -> None:
        model = nn.Linear(3, 4 + world.rank)
        with pytest.raises(ValueError, match="the ranks' parameters or bucket sizes differ"):
            Reducer(model.parameters(), world, SMALL)

    ranks(2, body)


@pytest.mark.parametrize("algorithm", ["ring", "native"])
@pytest.mark.slow
def test_a_dead_rank_surfaces_in_finish(ranks: Ranks, algorithm: str) -> None:
    config = AllReduceConfig(algorithm=algorithm, bucket_mb=0.001)

    def body(world: World) -> None:
        model = network()
        reducer = Reducer(model.parameters(), world, config)
        if world.rank == 1:
            return
        reducer.arm()
        loss_of(model, images(world.rank)).backward()
        with pytest.raises((ConnectionError, TimeoutError)):
            reducer.finish()
        reducer.close()
        reducer.close()

    ranks(2, body, timeout_s=1.0)


def test_closing_in_the_middle_of_a_step_does_not_wait(ranks: Ranks) -> None:
    """One rank fails in its backward pass: it can leave, and the other one learns of it."""

    def body(world: World) -> None:
        model = network()
        reducer = Reducer(model.parameters(), world, SMALL)
        reducer.arm()
        if world.rank == 0:
            loss_of(model[4], torch.ones(2, 40)).backward()
            reducer.close()
            assert not [t for t in threading.enumerate() if t is reducer._sender._thread]
        else:
            with pytest.raises(ConnectionError):
                reducer.finish()
            reducer.close()

    ranks(2, body, timeout_s=60.0)


def test_the_caller_keeps_its_number_of_threads(ranks: Ranks) -> None:
    before = torch.get_num_threads()

    def body(world: World) -> int:
        reducer = Reducer([nn.Parameter(torch.ones(3))], world, SMALL)
        reducer.close()
        return torch.get_num_threads()

    assert ranks(2, body) == [before, before]


def _against_ddp(rank: int, ports: list[int]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{ports[0]}", timedelta(seconds=60), world_size=2, rank=rank
    )
    world = World.connect(rank, 2, "127.0.0.1", ports[1], CPU, 60.0)
    ours, theirs = network(), nn.parallel.DistributedDataParallel(network())
    reducer = Reducer(ours.parameters(), world, SMALL)
    for step in range(3):
        inputs = images(2 * step + rank)
        theirs.zero_grad()
        loss_of(theirs, inputs).backward()
        reducer.zero_grad()
        reducer.arm()
        loss_of(ours, inputs).backward()
        reducer.finish()
        # With two ranks there is one order of summation, so the bits agree.
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    reducer.close()
    world.close()
    dist.destroy_process_group()


@pytest.mark.integration
def test_two_ranks_agree_with_ddp_bit_for_bit() -> None:
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = [a.getsockname()[1], b.getsockname()[1]]
    multiprocessing.spawn(_against_ddp, (ports,), nprocs=2)
