"""Transports send tensors between two workers; all-reduce algorithms are built on them.

`Transport` is all that an algorithm may know about the machine. `SocketTransport` moves CPU tensors
over its own links (links.py), without a progress thread; connect.py makes them. `NcclTransport`
moves CUDA tensors. Sums, wire types and byte counts are not known here.
"""

import os
import select
import time
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from trainer.engine.links import SILENT_S, Link, Transfer

_CHECK_S = 1.0  # between two checks for silent hosts, while nothing arrives
_SPIN_S = 50e-6  # of looking again before a wait, which the kernel ends after tens of microseconds


class PeerLost(ConnectionError):
    """The connection to another rank has ended, or its host does not answer.

    Attributes:
        rank: The other rank.
        unreachable: Whether no connection was possible, although nothing refused it.
    """

    def __init__(self, message: str, rank: int, unreachable: bool = False) -> None:
        super().__init__(message)
        self.rank = rank
        self.unreachable = unreachable

    @classmethod
    def connecting(cls, rank: int, peer: int, host: str, error: OSError) -> "PeerLost":
        """The failure of `rank` to connect to `peer` at `host`."""
        refused = isinstance(error, ConnectionError)
        return cls(f"rank {rank} cannot reach rank {peer} at {host}: {error}", peer, not refused)


class Handle(Protocol):
    """An exchange that has been started."""

    def wait(self) -> None:
        """Return when both tensors may be used again.

        On CUDA the current stream waits, not the caller. Raises ConnectionError when a peer is
        lost, TimeoutError when no byte has moved for the transport's time-out.
        """


class Transport(Protocol):
    """Point-to-point traffic between `size` ranks; used by one thread at a time."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def quick(self) -> bool:
        """Whether all ranks that this one exchanges tensors with answer within microseconds."""
        ...

    def exchange(self, outgoing: Tensor, to: int, incoming: Tensor, source: int) -> Handle:
        """Start to send `outgoing` to rank `to` and to fill `incoming` from rank `source`.

        Both are contiguous 1-D tensors, and stay untouched until the handle has been waited for.
        Several exchanges may be under way; those between the same two ranks keep their order.
        Sending and receiving are one call because NCCL deadlocks unless it may run them together.
        """
        ...


class _Exchange:
    """Handle of one exchange, which is done when both tensors have crossed completely."""

    __slots__ = ("_received", "_sent", "_transport")

    def __init__(self, transport: "SocketTransport", sent: Transfer, received: Transfer) -> None:
        self._transport = transport
        self._sent = sent
        self._received = received

    def wait(self) -> None:
        while len(self._sent.rest) or len(self._received.rest):
            self._transport.progress()


class SocketTransport:
    """Links to other ranks, driven by whichever thread waits.

    Bytes move inside `exchange` and `wait` only; in between, the buffers of the links keep the
    pipeline full. So it is the wait that detects a peer that died or is silent. After such an error
    every further call fails at once, because the streams are no longer in step.

    Args:
        rank: Of this process.
        size: Number of ranks.
        links: To the ranks that this one exchanges tensors with.
        timeout_s: Limit of each wait, in seconds.
    """

    def __init__(self, rank: int, size: int, links: list[Link], timeout_s: float) -> None:
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self.quick = all(link.quick for link in links)
        self._links = {link.rank: link for link in links}
        self._error: ConnectionError | TimeoutError | None = None

    def exchange(self, outgoing: Tensor, to: int, incoming: Tensor, source: int) -> Handle:
        self._refuse_if_broken()
        sent, received = Transfer(outgoing), Transfer(incoming)
        if len(received.rest):
            self._links[source].incoming.append(received)
        if len(sent.rest):
            self._links[to].outgoing.append(sent)
            self._move(self._links[to])
        return _Exchange(self, sent, received)

    def progress(self) -> None:
        """Move bytes on every busy link, after waiting until one of them can."""
        self._refuse_if_broken()
        busy = [link for link in self._links.values() if link.outgoing or link.incoming]
        if self._move_all(busy):
            return
        if all(link.quick for link in busy):
            enough = time.perf_counter() + _SPIN_S
            while time.perf_counter() < enough:
                os.sched_yield()  # to the peer, where it has no processor of its own
                if self._move_all(busy):
                    return
        deadline = time.monotonic() + self.timeout_s
        while not (self._poll(busy, min(_CHECK_S, self.timeout_s)) or self._move_all(busy)):
            for link in busy:
                if link.is_silent():
                    self._error = PeerLost(
                        f"rank {self.rank} lost rank {link.rank}: its host has not answered for "
                        f"{SILENT_S:g} s",
                        link.rank,
                    )
                    raise self._error
            if time.monotonic() >= deadline:
                names = ", ".join(str(link.rank) for link in busy)
                self._error = TimeoutError(
                    f"no byte moved between rank {self.rank} and rank {names} for "
                    f"{self.timeout_s:g} s"
                )
                raise self._error

    def close(self) -> None:
        """Close all connections; a thread that waits on them fails at once, and so do the peers."""
        self._error = self._error or ConnectionError(f"rank {self.rank} closed its connections")
        for link in self._links.values():
            link.close()

    def _move_all(self, links: list[Link]) -> bool:
        moved = False
        for link in links:
            moved |= self._move(link)
        return moved

    def _move(self, link: Link) -> bool:
        try:
            return link.push() | link.pull()
        except OSError as error:
            if self._error is None:
                message = f"rank {self.rank} lost rank {link.rank}: {error}"
                self._error = PeerLost(message, link.rank)
            self._refuse_if_broken(error)
            raise

    def _poll(self, busy: list[Link], timeout_s: float) -> bool:
        """Wait until a busy link can move bytes. Returns False after the time-out."""
        poll = select.poll()
        try:
            for link in busy:
                for sock, events in link.polls():
                    poll.register(sock, events)
        except (OSError, ValueError):  # another thread has closed it meanwhile
            self._refuse_if_broken()
            raise
        return bool(poll.poll(timeout_s * 1000))

    def _refuse_if_broken(self, cause: Exception | None = None) -> None:
        """Raise the first error again; a time-out as the ConnectionError that it amounts to."""
        match self._error:
            case PeerLost() as lost:
                raise PeerLost(str(lost), lost.rank) from cause
            case ConnectionError() | TimeoutError() as error:
                raise ConnectionError(str(error)) from cause


class NcclTransport:
    """CUDA tensors over the default process group, which must be NCCL's."""

    quick = False

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def exchange(self, outgoing: Tensor, to: int, incoming: Tensor, source: int) -> Handle:
        operations = []
        if outgoing.numel():
            operations.append(dist.P2POp(dist.isend, outgoing, to))
        if incoming.numel():
            operations.append(dist.P2POp(dist.irecv, incoming, source))
        return _NcclExchange(dist.batch_isend_irecv(operations) if operations else [])


class _NcclExchange:
    """Handle of one batch of NCCL operations."""

    def __init__(self, works: list[dist.Work]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()
