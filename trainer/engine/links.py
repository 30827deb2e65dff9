"""Links carry bytes between this process and one other, in order, in both directions.

`TcpLink` uses a TCP connection. `SharedLink` connects processes of one host through shared memory.
A link never waits: `push` and `pull` move what can be moved now, and `polls` says what to wait for.
"""

import contextlib
import mmap
import select
import socket
import struct
from collections import deque
from collections.abc import Iterator
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLOT_BYTES = 256 * 1024  # size of a slot of shared memory, and of the largest single copy
SLOTS = 4  # per direction: one is filled while another one is emptied
SHARED_BYTES = 2 * SLOTS * SLOT_BYTES  # memory of one link: two directions
LOW_WATER_BYTES = 1024 * 1024  # TCP wakes a receiver only for so many bytes, if it expects more
SILENT_S = 10.0  # a host whose kernel acknowledges nothing for so long is lost
_TCP_INFO_BYTES = 104  # the part of struct tcp_info that every Linux has


class Transfer:
    """The bytes of one tensor that have not crossed a link yet.

    Attributes:
        rest: uint8 [bytes left], a view of the tensor's memory; empty once all have crossed.

    Args:
        tensor: 1-D and contiguous, on the CPU, of any type.
    """

    __slots__ = ("rest",)

    def __init__(self, tensor: Tensor) -> None:
        self.rest = tensor.view(torch.uint8).numpy()


class Link(Protocol):
    """The connection to another process, and the transfers that wait for it.

    Transfers cross in the order in which they were appended to `outgoing` and `incoming`, and are
    removed when they have. The other process must expect transfers of the same lengths.

    Attributes:
        quick: Whether the other process can answer within microseconds, so that looking again for
            a while is better than a wait, which the kernel ends after tens of microseconds.
        rank: Of the other process.
        outgoing: To the other process.
        incoming: From it.
    """

    quick: ClassVar[bool]
    rank: int
    outgoing: deque[Transfer]
    incoming: deque[Transfer]

    def push(self) -> bool:
        """Send as many bytes of `outgoing` as is possible without waiting.

        Returns:
            Whether any byte was sent.

        Raises:
            OSError: The connection has ended, as when the other process has.
        """

    def pull(self) -> bool:
        """Receive the bytes of `incoming` that have arrived. Returns and raises as `push`."""

    def polls(self) -> Iterator[tuple[socket.socket, int]]:
        """Sockets, with the events (`select.POLLIN`, ...) after which it is time to move bytes."""

    def is_silent(self) -> bool:
        """Whether the other host has not answered for `SILENT_S` seconds."""

    def close(self) -> None:
        """End the connection; a thread that polls for it wakes up. May be called twice."""


class TcpLink:
    """A stream socket, usually of TCP."""

    quick: ClassVar[bool] = False
    __slots__ = ("_low_water", "incoming", "outgoing", "rank", "sock")

    def __init__(self, rank: int, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.rank = rank
        self.sock = sock
        self._low_water = 1
        self.outgoing: deque[Transfer] = deque()
        self.incoming: deque[Transfer] = deque()

    def push(self) -> bool:
        moved = False
        while self.outgoing:
            try:
                count = self.sock.send(self.outgoing[0].rest.data)
            except BlockingIOError:
                break
            _advance(self.outgoing, count)
            moved = True
        return moved

    def pull(self) -> bool:
        moved = False
        while self.incoming:
            try:
                count = self.sock.recv_into(self.incoming[0].rest.data)
            except BlockingIOError:
                break
            if count == 0:
                raise ConnectionError("it closed the connection")
            _advance(self.incoming, count)
            moved = True
        return moved

    def polls(self) -> Iterator[tuple[socket.socket, int]]:
        if self.incoming:
            # A wake-up for every few packets would take more processor time than copying them.
            low_water = min(len(self.incoming[0].rest), LOW_WATER_BYTES)
            if low_water != self._low_water:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)
                self._low_water = low_water
        events = (select.POLLIN if self.incoming else 0) | (select.POLLOUT if self.outgoing else 0)
        yield self.sock, events

    def is_silent(self) -> bool:
        """Whether the other kernel has acknowledged nothing for `SILENT_S` of attempts to send.

        The kernel of a host that runs acknowledges data also while the other process computes or is
        suspended, so that this tells a lost host or network from a slow process. (Linux only;
        without it, the kernel gives up after about 15 minutes.)

        Attempts are retransmissions; or, if this kernel has no route, so that the data never left,
        probes. These it also sends to a process that does not read, but each is answered then.
        """
        if not hasattr(socket, "TCP_INFO"):
            return False
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # another thread has closed it: the next attempt to use it reports that
            return False
        retransmits, probes = info[2], info[3]  # since the last acknowledgment
        (milliseconds,) = struct.unpack_from("I", info, 56)  # since then
        return (retransmits > 0 or probes > 1) and milliseconds >= SILENT_S * 1000

    def close(self) -> None:
        _close(self.sock)


class SharedLink:
    """Shared memory, with one Unix socket for each direction.

    A direction has `SLOTS` slots of memory, which are used in turn. The sender fills a slot and
    writes one byte to the socket of that direction; the receiver empties the slot and writes one
    byte back. So the processes need no atomic operations (a system call orders what they read and
    write), a wait is a wait for a socket, and the end of a process is seen at once, as its sockets
    close. Both sides know the length of each transfer, and so how it is cut.

    Args:
        rank: Of the other process.
        outbound: Socket of the direction from this process to the other one.
        inbound: Socket of the direction from the other process to this one.
        memory: Of `SHARED_BYTES`, mapped by both.
        first: Whether the first half of the memory belongs to the direction `outbound`.
    """

    quick: ClassVar[bool] = True
    __slots__ = ("_inbound", "_outbound", "incoming", "outgoing", "rank")

    def __init__(
        self,
        rank: int,
        outbound: socket.socket,
        inbound: socket.socket,
        memory: mmap.mmap,
        first: bool,
    ) -> None:
        self.rank = rank
        self.outgoing: deque[Transfer] = deque()
        self.incoming: deque[Transfer] = deque()
        halves = np.frombuffer(memory, np.uint8).reshape(2, SLOTS, SLOT_BYTES)
        self._outbound = _Direction(outbound, halves[1 - first], ready=SLOTS)
        self._inbound = _Direction(inbound, halves[int(first)], ready=0)

    def push(self) -> bool:
        moved = False
        while self.outgoing and (slot := self._outbound.slot()) is not None:
            part = self.outgoing[0].rest[:SLOT_BYTES]
            slot[: len(part)] = part
            self._outbound.hand_over()
            _advance(self.outgoing, len(part))
            moved = True
        return moved

    def pull(self) -> bool:
        moved = False
        while self.incoming and (slot := self._inbound.slot()) is not None:
            part = self.incoming[0].rest[:SLOT_BYTES]
            part[:] = slot[: len(part)]
            with contextlib.suppress(ConnectionError):  # it left after sending its last bytes
                self._inbound.hand_over()
            _advance(self.incoming, len(part))
            moved = True
        return moved

    def polls(self) -> Iterator[tuple[socket.socket, int]]:
        if self.outgoing:
            yield self._outbound.sock, select.POLLIN
        if self.incoming:
            yield self._inbound.sock, select.POLLIN

    def is_silent(self) -> bool:
        return False  # the host of both processes runs

    def close(self) -> None:
        _close(self._outbound.sock)
        _close(self._inbound.sock)


class _Direction:
    """One direction of a `SharedLink`, as the process at one of its ends sees it.

    Args:
        sock: Carries one byte for each slot that a process hands over to the other one.
        slots: uint8 [SLOTS, SLOT_BYTES], the shared memory of the direction.
        ready: How many slots belong to this process at first: all to the sender, none to the
            receiver.
    """

    __slots__ = ("_done", "_ready", "_slots", "sock")

    def __init__(self, sock: socket.socket, slots: NDArray[np.uint8], ready: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._slots: list[NDArray[np.uint8]] = list(slots)
        self._done = 0  # slots that this process has handed over so far
        self._ready = ready  # slots that belong to it now

    def slot(self) -> NDArray[np.uint8] | None:
        """The slot that this process may fill or empty next; None: the other one has them all."""
        if not self._ready:
            try:
                self._ready = len(self.sock.recv(SLOTS))
            except BlockingIOError:
                return None
            if not self._ready:
                raise ConnectionError("it closed the connection")
        return self._slots[self._done % SLOTS]

    def hand_over(self) -> None:
        """Give the slot that `slot` returned to the other process."""
        self._done += 1
        self._ready -= 1
        self.sock.send(b"\0")  # fits: never more than SLOTS bytes are on their way


def _advance(transfers: deque[Transfer], count: int) -> None:
    """`count` bytes of the first transfer have crossed."""
    first = transfers[0]
    first.rest = first.rest[count:]
    if not len(first.rest):
        transfers.popleft()


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the peer was faster, or this is the second close
        sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that polls; close would not
    sock.close()
