"""Collectives on flat tensors: the mean or sum over all ranks, broadcast and gather.

`RingAllReduce` is the bandwidth-optimal ring of Patarasuk and Yuan (2009), written over a
`Transport`; `NativeAllReduce` lets gloo or NCCL do it. Both round what travels to the wire type,
count the bytes that this rank sends, and leave the same bits on every rank. `broadcast` and
`gather` pass tensors along a chain of ranks. Gradients and buckets are not known here (reducer.py).

All ranks must make the same calls in the same order. On the CPU a call blocks until this rank is
done; on CUDA it returns once the work is on the current stream. Any of them raises ConnectionError
when another rank is gone, and TimeoutError when no byte has arrived for the transport's time-out.
"""

from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from trainer.engine.transport import Handle, Transport

WIRE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

IN_FLIGHT = 2  # exchanges under way at a time: one arrives while the one before it is added
SEGMENT_BYTES = 2048 * 1024  # largest part of a message that is sent in one exchange
SMALL_BYTES = 128 * 1024  # up to so many bytes sent per rank, latency counts more than traffic
MANY_RANKS = 8  # from so many ranks on, small tensors take several rounds


class AllReduce(Protocol):
    """Averages tensors over ranks; used by one thread at a time."""

    @property
    def sent_bytes(self) -> int:
        """Bytes of payload that this rank has sent so far."""

    def mean_(self, flat: Tensor) -> None:
        """Replace a tensor by its mean over all ranks. A collective call.

        Args:
            flat: [n], contiguous, of a floating type; n and type are the same on all ranks.

        Raises:
            ValueError: Another kind of tensor.
            ConnectionError: A rank is gone.
            TimeoutError: A rank is silent.
        """


class RingAllReduce:
    """Reduce-scatter, then all-gather, around a ring of point-to-point sends.

    The tensor is cut into N chunks, one per rank. In N-1 hops every rank sends a partial sum to its
    right neighbour and adds its own values to the one that comes from the left; then each rank owns
    one finished chunk, and N-1 more hops hand these around. A rank sends 2 (N-1)/N of the payload,
    the least possible. Chunks travel in segments, so that one segment is added while the next one
    arrives. Small tensors do not take the ring, whose 2 (N-1) hops would take most of the time. In
    a group of less than MANY_RANKS, one round does it, if a rank sends at most SMALL_BYTES:
    everybody sends everything to everybody, and each rank adds all values, in the order of ranks.
    Larger groups use recursive doubling, with about log2 N rounds, for tensors up to a size that
    grows with N (Thakur, Rabenseifner and Gropp, "Optimization of collective communication
    operations in MPICH", 2005).

    Sums are FP32 (FP64 for FP64 tensors); what travels is rounded to `wire`, except the results
    that recursive doubling sends to the ranks beyond the largest power of two. For an fp16 wire the
    values are divided by N before, so that sums fit wherever the values do; otherwise the finished
    sum is divided. Inf and NaN reach all ranks. Equal inputs give equal bits.

    Error: let u be the unit roundoff of the sums (2^-24; FP64: 2^-53) and w that of the wire (fp16
    2^-11, bf16 2^-8, fp32 2^-24, but 0 for FP32 sums on an fp32 wire). On its way around the ring a
    value passes at most N-1 additions and one division, each a factor 1 + d with |d| <= u, and N
    roundings to the wire: N-1 as part of a partial sum, one as part of the finished mean. (In one
    round it is a single rounding.) So for each element

        |result - mean| <= ((1 + u)^N (1 + w)^N - 1) * mean of |x_i|

    and N * 2^-25 more on an fp16 wire, N * 2^-126 on others, for what falls below the normal
    numbers. A tensor that is narrower than the sums rounds once more, when the mean is stored.

    Args:
        transport: To the ranks that `neighbours` names, at least.
        wire: Type of the values that travel.
        segment_bytes: Largest part of a message that is sent in one exchange.
    """

    def __init__(
        self, transport: Transport, wire: torch.dtype, segment_bytes: int = SEGMENT_BYTES
    ) -> None:
        self.sent_bytes = 0
        self._transport = transport
        self._wire = wire
        self._segment_bytes = segment_bytes
        self._buffers = Buffers()

    def mean_(self, flat: Tensor) -> None:
        _check(flat)
        size = self._transport.size
        if size == 1 or flat.numel() == 0:
            return
        total = _widened(flat, self._buffers)
        divide_last = self._wire != torch.float16
        if not divide_last:
            total.div_(size)
        self._reduce(total, mean=divide_last)
        if total is not flat:
            flat.copy_(total)

    def sum_(self, flat: Tensor) -> None:
        """Replace a tensor by its sum over all ranks. A collective call; errors as of `mean_`.

        Args:
            flat: [n], contiguous, of the wire type, which may be any that can be added. Sums are
                in that type.
        """
        if self._transport.size > 1 and flat.numel():
            self._reduce(flat, mean=False)

    def _reduce(self, total: Tensor, mean: bool) -> None:
        """Replace `total` by its sum over all ranks, divided by their number for a mean."""
        size = self._transport.size
        payload = total.numel() * self._wire.itemsize
        if size < MANY_RANKS:
            small = (size - 1) * payload <= SMALL_BYTES
            sum_small = self._one_round
        else:  # the more hops a ring has, the larger are the tensors that avoid it
            small = size.bit_length() * payload <= SMALL_BYTES * size // MANY_RANKS
            sum_small = self._doubling
        if small:
            sum_small(total, mean)
        else:
            self._ring(total, mean)

    def _one_round(self, total: Tensor, mean: bool) -> None:
        """Everybody sends everything to everybody, and adds it all, in the order of ranks."""
        rank, size = self._transport.rank, self._transport.size
        length = total.numel()
        rows = self._buffers.get("rows", size * length, self._wire, total.device)
        rows = rows.view(size, length)
        rows[rank].copy_(total)
        for handle in start_all_gather(self._transport, rows):
            handle.wait()
        self.sent_bytes += (size - 1) * rows[rank].nbytes
        total.copy_(rows[0])
        for row in rows[1:]:
            total.add_(row)
        if mean:
            total.div_(size)

    def _doubling(self, total: Tensor, mean: bool) -> None:
        """In each round, two ranks exchange their sums, over twice as many ranks each time.

        If N is no power of two, let P be the largest one below N: rank r >= P sends its values to
        rank r - P before the rounds, which adds them to its own, and gets the result from there
        after them, which is not rounded to the wire, so that it has the same bits there. Of two
        sums, that of the lower ranks is the first operand on both sides.
        """
        rank, size = self._transport.rank, self._transport.size
        power = _power_of_two(size)
        arriving, leaving = (
            self._buffers.get(name, len(total), self._wire, total.device)
            for name in ("arriving", "leaving")
        )
        nothing = total[:0]
        if rank >= power:
            self._exchange(leaving.copy_(total), rank - power, nothing, rank).wait()
            self._exchange(nothing, rank, total, rank - power).wait()
            return
        if rank + power < size:
            self._exchange(nothing, rank, arriving, rank + power).wait()
            total.add_(arriving)
        distance = 1
        while distance < power:
            peer = rank ^ distance
            self._exchange(leaving.copy_(total), peer, arriving, peer).wait()
            lower, upper = (leaving, arriving) if rank < peer else (arriving, leaving)
            total.copy_(lower).add_(upper)
            distance *= 2
        if mean:
            total.div_(size)
        if rank + power < size:
            self._exchange(total, rank + power, nothing, rank).wait()

    def _ring(self, total: Tensor, mean: bool) -> None:
        """Reduce-scatter, then all-gather, in segments of which `IN_FLIGHT` are under way."""
        rank, size = self._transport.rank, self._transport.size
        exact = self._wire == total.dtype  # sums travel as they are, without copies
        longest = -(-total.numel() // size) * self._wire.itemsize
        segments = -(-longest // self._segment_bytes)
        room = -(-total.numel() // (size * segments)) + 1  # elements of the longest segment
        inbox = self._buffers.get("inbox", IN_FLIGHT * room, self._wire, total.device)
        outbox = (
            inbox if exact else self._buffers.get("outbox", len(inbox), self._wire, total.device)
        )

        def launch(step: int) -> tuple[Handle, int, Tensor, Tensor]:
            """Start the exchange of one segment in one hop."""
            hop, segment = divmod(step, segments)
            slot = step % IN_FLIGHT * room
            mine = _piece(total, size, (rank - hop) % size, segments, segment)
            theirs = _piece(total, size, (rank - hop - 1) % size, segments, segment)
            arriving = inbox[slot : slot + len(theirs)]
            if exact:
                leaving = mine
                if hop >= size - 1:
                    arriving = theirs  # finished values need no sum, nor a stop on the way
            else:
                leaving = outbox[slot : slot + len(mine)].copy_(mine)
                if hop == size - 1:
                    mine.copy_(leaving)  # the owner keeps what all others get
            handle = self._exchange(leaving, rank + 1, arriving, rank - 1)
            return handle, hop, arriving, theirs

        def land(handle: Handle, hop: int, arrived: Tensor, theirs: Tensor) -> None:
            """Add the values received in one exchange, or store them if they are final."""
            handle.wait()
            if hop >= size - 1:
                if not exact:
                    theirs.copy_(arrived)
                return
            theirs.add_(arrived)
            if hop == size - 2 and mean:
                theirs.div_(size)

        steps = 2 * (size - 1) * segments
        lag = min(IN_FLIGHT, segments)  # a segment must have landed before its next hop
        under_way: deque[tuple[Handle, int, Tensor, Tensor]] = deque()
        for step in range(steps + lag):
            if step >= lag:
                land(*under_way.popleft())
            if step < steps:
                under_way.append(launch(step))

    def _exchange(self, leaving: Tensor, to: int, arriving: Tensor, source: int) -> Handle:
        size = self._transport.size
        self.sent_bytes += leaving.nbytes
        return self._transport.exchange(leaving, to % size, arriving, source % size)


def start_all_gather(transport: Transport, rows: Tensor) -> list[Handle]:
    """Start to send one row to all other ranks, and to receive one from each of them.

    Args:
        transport: To all ranks.
        rows: [N, n], contiguous; row r is that of rank r, and the same type and n on all ranks.

    Returns:
        What to wait for before `rows` is used again; (N-1) rows are sent then.
    """
    rank, size = transport.rank, transport.size
    handles = []
    for distance in range(1, size):
        to, source = (rank + distance) % size, (rank - distance) % size
        handles.append(transport.exchange(rows[rank], to, rows[source], source))
    return handles


def neighbours(rank: int, size: int) -> set[int]:
    """The ranks that `rank` exchanges tensors with in the collectives of this module.

    In a group of less than MANY_RANKS that is every other rank, in a larger one a few more than
    log2 N of them (`start_all_gather` alone, which `Lossy` uses, needs all ranks also there).
    """
    peers = {(rank - 1) % size, (rank + 1) % size}
    if size < MANY_RANKS:
        peers.update(range(size))
    else:
        power = _power_of_two(size)
        if rank < power:
            peers.update(rank ^ 1 << bit for bit in range(power.bit_length() - 1))
        peers.update({rank - power, rank + power} & set(range(size)))
    return peers - {rank}


def broadcast(transport: Transport, flat: Tensor) -> None:
    """Replace a tensor by rank 0's, passed from rank to rank in segments. A collective call.

    Returns when this rank has received all and passed it on.

    Args:
        transport: To the ranks before and after this one, if there are any.
        flat: [n], contiguous; n and type are the same on all ranks.

    Raises:
        ConnectionError: A rank is gone.
        TimeoutError: A rank is silent.
    """
    rank, size = transport.rank, transport.size
    pieces = flat.split(SEGMENT_BYTES // flat.itemsize)
    nothing = flat[:0]
    arriving = [transport.exchange(nothing, 0, piece, rank - 1) for piece in pieces if rank > 0]
    leaving = []
    for number, piece in enumerate(pieces):
        if rank > 0:
            arriving[number].wait()
        if rank < size - 1:
            leaving.append(transport.exchange(piece, rank + 1, nothing, 0))
    for handle in leaving:
        handle.wait()


def gather(transport: Transport, own: Tensor, lengths: list[int]) -> list[Tensor]:
    """Collect the tensors of all ranks on rank 0, in segments. A collective call.

    They are passed down from rank to rank, one tensor after another: besides its own, a rank other
    than 0 holds one or two of them at a time.

    Args:
        transport: To the ranks before and after this one, if there are any.
        own: The tensor of this rank, [lengths[rank]] and contiguous; types are the same.
        lengths: Numbers of values of the tensors of all ranks, in their order.

    Returns:
        The tensors by rank, on rank 0; on the others an empty list. Errors as of `broadcast`.
    """
    rank, size = transport.rank, transport.size
    nothing = own[:0]
    parts = []
    for source in range(rank, size):
        part = own if source == rank else own.new_empty(lengths[source])
        leaving = []
        for piece in part.split(SEGMENT_BYTES // part.itemsize):
            if source > rank:
                transport.exchange(nothing, rank, piece, rank + 1).wait()
            if rank > 0:
                leaving.append(transport.exchange(piece, rank - 1, nothing, rank))
        for handle in leaving:
            handle.wait()
        if rank == 0:
            parts.append(part)
    return parts


class NativeAllReduce:
    """The back end's own all-reduce.

    The values are rounded to `wire` before and, by gloo, after each addition; for an fp16 wire they
    are divided by N first. `sent_bytes` is not measured but computed, as 2 (N-1)/N of the payload,
    the traffic of a ring.

    Args:
        reduce: Replaces a contiguous 1-D tensor by its sum over all ranks.
        size: Number of ranks, N.
        wire: Type of the tensors that `reduce` gets.
    """

    def __init__(self, reduce: Callable[[Tensor], None], size: int, wire: torch.dtype) -> None:
        self.sent_bytes = 0
        self._reduce = reduce
        self._size = size
        self._wire = wire
        self._buffers = Buffers()

    def mean_(self, flat: Tensor) -> None:
        _check(flat)
        if self._size == 1 or flat.numel() == 0:
            return
        total = _widened(flat, self._buffers)
        if self._wire == torch.float16:
            total.div_(self._size)
        travels = total
        if self._wire != total.dtype:
            travels = self._buffers.get("travels", len(flat), self._wire, flat.device).copy_(total)
        self._reduce(travels)
        self.sent_bytes += 2 * (self._size - 1) * travels.nbytes // self._size
        if travels is not total:
            total.copy_(travels)
        if self._wire != torch.float16:
            total.div_(self._size)
        if total is not flat:
            flat.copy_(total)


class Buffers:
    """Work memory that is kept from call to call, and grows when more is needed."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def get(self, name: str, length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialized tensor [length], in the memory of the last one of this name and type."""
        kept = self._kept.get((name, dtype))
        if kept is None or len(kept) < length:
            kept = self._kept[name, dtype] = torch.empty(length, dtype=dtype, device=device)
        return kept[:length]


def _power_of_two(size: int) -> int:
    """The largest power of two that is at most `size`."""
    return int(1 << size.bit_length() - 1)


def _check(flat: Tensor) -> None:
    if flat.dim() != 1 or not flat.is_contiguous() or not flat.is_floating_point():
        raise ValueError(
            f"cannot average a tensor of shape {tuple(flat.shape)}, strides {flat.stride()} and "
            f"type {flat.dtype}: it must be contiguous, 1-D and of a floating type"
        )


def _widened(flat: Tensor, buffers: Buffers) -> Tensor:
    """`flat` itself if sums may be kept in its type, else an FP32 copy."""
    if flat.dtype in (torch.float32, torch.float64):
        return flat
    return buffers.get("total", len(flat), torch.float32, flat.device).copy_(flat)


def _piece(total: Tensor, chunks: int, chunk: int, segments: int, segment: int) -> Tensor:
    """One of `segments` almost equal parts of one of `chunks` almost equal parts of `total`."""
    length = len(total)
    start, stop = chunk * length // chunks, (chunk + 1) * length // chunks
    length = stop - start
    return total[start + segment * length // segments : start + (segment + 1) * length // segments]
