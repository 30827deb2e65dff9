"""All-reduce algorithms compared with exact means, over socket pairs between threads."""

import math
import mmap
import socket
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.engine import ring
from trainer.engine.links import SHARED_BYTES, Link, SharedLink, TcpLink
from trainer.engine.ring import WIRE_TYPES, NativeAllReduce, RingAllReduce, neighbours
from trainer.engine.transport import SocketTransport
from trainer.engine.world import World

Ranks = Callable[..., list[Any]]
ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


def linked(size: int, shared: bool = False) -> list[SocketTransport]:
    """Transports of ranks that are linked as in a group, by sockets or through shared memory."""
    links: list[list[Link]] = [[] for _ in range(size)]
    for a in range(size):
        for b in (peer for peer in neighbours(a, size) if peer > a):
            left, right = socket.socketpair()
            if shared:
                back, forth = socket.socketpair()
                memory = mmap.mmap(-1, SHARED_BYTES)
                links[a].append(SharedLink(b, left, back, memory, first=True))
                links[b].append(SharedLink(a, forth, right, memory, first=False))
            else:
                links[a].append(TcpLink(b, left))
                links[b].append(TcpLink(a, right))
    return [SocketTransport(rank, size, own, 10.0) for rank, own in enumerate(links)]


def reduce_all(
    threads: Ranks,
    values: list[Tensor],
    wire: torch.dtype,
    segment_bytes: int = 1 << 20,
    shared: bool = False,
) -> tuple[list[Tensor], list[int]]:
    """The ring's result and the bytes sent, of each rank."""
    size = len(values)
    transports = linked(size, shared)

    def body(rank: int) -> tuple[Tensor, int]:
        all_reduce = RingAllReduce(transports[rank], wire, segment_bytes)
        result = values[rank].clone()
        all_reduce.mean_(result)
        return result, all_reduce.sent_bytes

    try:
        results = threads(size, body)
    finally:
        for transport in transports:
            transport.close()
    return [result for result, _ in results], [sent for _, sent in results]


def same_bits(tensors: list[Tensor]) -> bool:
    return all(
        torch.equal(tensors[0].view(torch.uint8), other.view(torch.uint8)) for other in tensors
    )


def exact_mean(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The mean of the values, and of their magnitudes, in float64 by exact summation."""
    columns = torch.stack([value.double() for value in values]).T.tolist()
    mean = [math.fsum(column) / len(column) for column in columns]
    magnitude = [math.fsum(map(abs, column)) / len(column) for column in columns]
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(magnitude, dtype=torch.float64)


@given(
    size=st.one_of(st.integers(1, 5), st.integers(8, 11)),
    length=st.one_of(st.integers(0, 12), st.integers(13, 700)),
    dtype=st.sampled_from(list(ROUNDOFF)),
    wire=st.sampled_from(list(WIRE_TYPES.values())),
    segment_bytes=st.sampled_from([4, 100, 1 << 20]),
    shared=st.booleans(),
    small_bytes=st.sampled_from([0, ring.SMALL_BYTES]),
    scale=st.sampled_from([1e-6, 1.0, 100.0]),
    seed=st.integers(0, 2**32),
)
def test_result_is_the_mean_within_the_stated_error(
    threads: Ranks,
    size: int,
    length: int,
    dtype: torch.dtype,
    wire: torch.dtype,
    segment_bytes: int,
    shared: bool,
    small_bytes: int,
    scale: float,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    values = [
        (torch.randn(length, generator=random, dtype=torch.float64) * scale).to(dtype)
        for _ in range(size)
    ]
    with mock.patch.object(ring, "SMALL_BYTES", small_bytes):
        results, _ = reduce_all(threads, values, wire, segment_bytes, shared)

    assert same_bits(results)
    mean, magnitude = exact_mean(values)
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    u, w = ROUNDOFF[sums], 0.0 if wire == sums else ROUNDOFF[wire]
    relative = (1 + u) ** size * (1 + w) ** size - 1 + 2.0**-52  # the last: of the exact mean
    bound = relative * magnitude + size * (2.0**-25 if wire == torch.float16 else 2.0**-126)
    if dtype not in (torch.float32, torch.float64):
        bound += ROUNDOFF[dtype] * (mean.abs() + bound) + 2.0**-25
    assert bool(((results[0].double() - mean).abs() <= bound).all())


@pytest.mark.parametrize("wire", WIRE_TYPES.values(), ids=WIRE_TYPES)
def test_segments_do_not_change_a_bit(threads: Ranks, wire: torch.dtype) -> None:
    values = list(torch.randn(3, 50_001, generator=torch.Generator().manual_seed(0)))
    whole, _ = reduce_all(threads, values, wire, 1 << 30)
    for segment_bytes in (1 << 12, 1 << 15):
        assert same_bits([whole[0], *reduce_all(threads, values, wire, segment_bytes)[0]])


def test_wire_rounds_a_value_at_each_hop(threads: Ranks) -> None:
    """1 + 2^-8 is no bf16 value: a partial sum loses it, and an FP32 wire keeps it."""
    values = [torch.full((40_000,), value) for value in (1.0, 2.0**-8, 2.0**-8, 2.0**-8)]
    exact, _ = reduce_all(threads, values, torch.float32)
    assert exact[0].unique().tolist() == [(1 + 3 * 2.0**-8) / 4]
    rounded, _ = reduce_all(threads, values, torch.bfloat16)
    assert (1 + 3 * 2.0**-8) / 4 not in rounded[0].tolist()
    assert torch.equal(rounded[0], rounded[0].bfloat16().float())  # the owner has no better value


@pytest.mark.parametrize("length", [3, 100_000])
@pytest.mark.parametrize("wire", WIRE_TYPES.values(), ids=WIRE_TYPES)
def test_inf_and_nan_reach_every_rank(threads: Ranks, wire: torch.dtype, length: int) -> None:
    values = [torch.ones(length) for _ in range(3)]
    values[1][0] = math.inf
    values[2][1] = math.nan
    for result in reduce_all(threads, values, wire)[0]:
        assert result[0] == math.inf
        assert math.isnan(result[1])
        assert bool((result[2:] - 1).abs().max() < 2.0**-10)  # a third is no fp16 value


@pytest.mark.parametrize("length", [3, 100_000])
def test_fp16_sums_do_not_overflow(threads: Ranks, length: int) -> None:
    values = [torch.full((length,), 60_000.0) for _ in range(4)]
    results, _ = reduce_all(threads, values, torch.float16)
    assert results[0].unique().tolist() == [60_000.0]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("wire", WIRE_TYPES.values(), ids=WIRE_TYPES)
def test_sent_bytes(threads: Ranks, size: int, wire: torch.dtype) -> None:
    length = size * 30_000
    _, sent = reduce_all(threads, [torch.ones(length)] * size, wire)
    assert sent == [2 * (size - 1) * 30_000 * wire.itemsize] * size
    _, sent = reduce_all(threads, [torch.ones(7)] * size, wire)
    assert sent == [(size - 1) * 7 * wire.itemsize] * size


@pytest.mark.parametrize("size", [8, 11])
def test_sent_bytes_of_recursive_doubling(threads: Ranks, size: int) -> None:
    """Values in each of three rounds; of 11 ranks, three send theirs before, and get the result."""
    _, sent = reduce_all(threads, [torch.ones(7)] * size, torch.bfloat16)
    values, result = 7 * 2, 7 * 4
    beyond = size - 8
    in_rounds = [3 * values + result] * beyond + [3 * values] * (8 - beyond)
    assert sent == in_rounds + [values] * beyond


def test_work_buffers_are_kept(threads: Ranks) -> None:
    transports = linked(2)

    def body(rank: int) -> bool:
        all_reduce = RingAllReduce(transports[rank], torch.bfloat16, 1 << 12)
        places = []
        for _ in range(2):
            for length in (100, 90_000, 100_000):
                all_reduce.mean_(torch.ones(length))
            places.append([kept.data_ptr() for kept in all_reduce._buffers._kept.values()])
        return places[0] == places[1]

    assert threads(2, body) == [True, True]
    for transport in transports:
        transport.close()


@pytest.mark.parametrize("wire", WIRE_TYPES.values(), ids=WIRE_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_native_is_the_mean(ranks: Ranks, wire: torch.dtype, dtype: torch.dtype) -> None:
    values = torch.randn(3, 1001, generator=torch.Generator().manual_seed(0)).to(dtype)

    def body(world: World) -> tuple[Tensor, int]:
        native = NativeAllReduce(world.native_all_reduce, world.size, wire)
        result = values[world.rank].clone()
        native.mean_(result)
        native.mean_(torch.empty(0))
        return result, native.sent_bytes

    results = ranks(3, body)
    assert same_bits([result for result, _ in results])
    mean, magnitude = exact_mean(list(values))
    error = (results[0][0].double() - mean).abs()
    roundings = 4 * (ROUNDOFF[wire] + ROUNDOFF[dtype])
    assert bool((error <= roundings * magnitude + 2.0**-23).all())
    assert results[0][1] == 2 * 2 * 1001 * wire.itemsize // 3


@pytest.mark.parametrize(
    "tensor", [torch.ones(2, 3), torch.ones(6)[::2], torch.ones(3, dtype=torch.int64)]
)
def test_other_tensors_are_refused(tensor: Tensor) -> None:
    for all_reduce in (
        RingAllReduce(SocketTransport(0, 1, [], 1.0), torch.float32, 1024),
        NativeAllReduce(lambda _: None, 1, torch.float32),
    ):
        with pytest.raises(ValueError, match="contiguous, 1-D and of a floating type"):
            all_reduce.mean_(tensor)
