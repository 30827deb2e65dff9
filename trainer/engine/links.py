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
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

SLOT_BYTES = 256 * 1024  # of shared memory that are copied at a time
SLOTS = 4  # per direction: one is filled while another one is emptied
SHARED_BYTES = 2 * SLOTS * SLOT_BYTES  # of a link
LOW_WATER_BYTES = 1024 * 1024  # that TCP collects before it wakes a receiver who waits for more
SILENT_S = 10.0  # a host whose kernel acknowledges nothing for so long is lost
_TCP_INFO_BYTES = 104  # the part of struct tcp_info that every Linux has


class Transfer:
    """The bytes of one tensor that have not crossed a link yet."""

    __slots__ = ("rest",)

    def __init__(self, tensor: Tensor) -> None:
        self.rest = tensor.view(torch.uint8).numpy()


class Link(Protocol):
    """The connection to another process, and the transfers that wait for it."""

    rank: int  # of the other process
    outgoing: deque[Transfer]
    incoming: deque[Transfer]
    quick: bool  # whether an answer takes microseconds, so that it is worth looking for it again

    def push(self) -> bool:
        """Send as much as is possible without waiting. Returns whether anything was sent.

        Raises OSError when the other process is gone.
        """

    def pull(self) -> bool:
        """Receive what is there now. Returns whether anything moved. Errors as of `push`."""

    def polls(self) -> Iterator[tuple[socket.socket, int]]:
        """Sockets, with the events (`select.POLLIN`, ...) after which it is time to move bytes."""

    def is_silent(self) -> bool:
        """Whether the other host has not answered for `SILENT_S`."""

    def close(self) -> None:
        """End the connection; a thread that polls for it wakes up. May be called twice."""


class TcpLink:
    """A stream socket, usually of TCP."""

    __slots__ = ("_low_water", "incoming", "outgoing", "quick", "rank", "sock")

    def __init__(self, rank: int, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.rank = rank
        self.sock = sock
        self.quick = False
        self._low_water = 1
        self.outgoing: deque[Transfer] = deque()
        self.incoming: deque[Transfer] = deque()

    def push(self) -> bool:
        moved = False
        while self.outgoing:
            transfer = self.outgoing[0]
            try:
                count = self.sock.send(transfer.rest.data)
            except BlockingIOError:
                break
            moved = True
            transfer.rest = transfer.rest[count:]
            if not len(transfer.rest):
                self.outgoing.popleft()
        return moved

    def pull(self) -> bool:
        moved = False
        while self.incoming:
            transfer = self.incoming[0]
            try:
                count = self.sock.recv_into(transfer.rest.data)
            except BlockingIOError:
                break
            if count == 0:
                raise ConnectionError("it closed the connection")
            moved = True
            transfer.rest = transfer.rest[count:]
            if not len(transfer.rest):
                self.incoming.popleft()
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
        """Whether the peer's kernel has acknowledged nothing for `SILENT_S` of retransmissions.

        The kernel of a host that runs acknowledges data also while our peer computes or is
        suspended, so that this tells a lost host or network from a slow peer. (Linux only; the
        kernel itself gives up after about 15 minutes.)
        """
        if not hasattr(socket, "TCP_INFO"):
            return False
        try:
            info = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # another thread has closed it: the next attempt to use it reports that
            return False
        retransmits: int = info[2]
        (milliseconds,) = struct.unpack_from("I", info, 56)  # since the last acknowledgment
        return retransmits > 0 and milliseconds >= SILENT_S * 1000

    def close(self) -> None:
        _close(self.sock)


class SharedLink:
    """Shared memory, with one Unix socket for each direction.

    A direction has `SLOTS` slots of memory. The sender fills a slot and writes one byte to the
    socket of that direction; the receiver empties the slot and writes one byte back. So the
    processes need no atomic operations (a system call orders what they read and write), a wait is a
    wait for a socket, and the end of a process is seen at once, as its sockets close. Both
    sides know the length of each transfer, and so how it is cut.

    Args:
        rank: Of the other process.
        outbound: Socket of the direction from this process to the other one.
        inbound: Socket of the direction from the other process to this one.
        memory: Of `SHARED_BYTES`, mapped by both.
        first: Whether the first half of the memory belongs to the direction `outbound`.
    """

    __slots__ = (
        "_emptied", "_filled", "_free", "_full", "_inbound", "_inbox", "_outbound", "_outbox",
        "incoming", "outgoing", "quick", "rank",
    )  # fmt: skip

    def __init__(
        self,
        rank: int,
        outbound: socket.socket,
        inbound: socket.socket,
        memory: mmap.mmap,
        first: bool,
    ) -> None:
        for sock in (outbound, inbound):
            sock.setblocking(False)
        self.rank = rank
        self.quick = True
        self.outgoing: deque[Transfer] = deque()
        self.incoming: deque[Transfer] = deque()
        self._outbound = outbound
        self._inbound = inbound
        halves = np.frombuffer(memory, np.uint8).reshape(2, SLOTS, SLOT_BYTES)
        self._outbox, self._inbox = list(halves[1 - first]), list(halves[int(first)])
        self._filled = 0  # number of slots that this process has filled so far
        self._emptied = 0  # likewise
        self._free = SLOTS  # slots of the outbox that may be filled
        self._full = 0  # slots of the inbox that may be emptied

    def push(self) -> bool:
        moved = False
        while self.outgoing:
            if not self._free:
                self._free = _count(self._outbound)
                if not self._free:
                    break
            transfer = self.outgoing[0]
            part = transfer.rest[:SLOT_BYTES]
            self._outbox[self._filled % SLOTS][: len(part)] = part
            self._outbound.send(b"\0")  # fits: never more than SLOTS bytes are on their way
            self._filled += 1
            self._free -= 1
            moved = True
            transfer.rest = transfer.rest[len(part) :]
            if not len(transfer.rest):
                self.outgoing.popleft()
        return moved

    def pull(self) -> bool:
        moved = False
        while self.incoming:
            if not self._full:
                self._full = _count(self._inbound)
                if not self._full:
                    break
            transfer = self.incoming[0]
            part = transfer.rest[:SLOT_BYTES]
            part[:] = self._inbox[self._emptied % SLOTS][: len(part)]
            with contextlib.suppress(ConnectionError):  # it left after sending its last bytes
                self._inbound.send(b"\0")
            self._emptied += 1
            self._full -= 1
            moved = True
            transfer.rest = transfer.rest[len(part) :]
            if not len(transfer.rest):
                self.incoming.popleft()
        return moved

    def polls(self) -> Iterator[tuple[socket.socket, int]]:
        if self.outgoing:
            yield self._outbound, select.POLLIN
        if self.incoming:
            yield self._inbound, select.POLLIN

    def is_silent(self) -> bool:
        return False  # the host of both processes runs

    def close(self) -> None:
        _close(self._outbound)
        _close(self._inbound)


def _count(sock: socket.socket) -> int:
    """The number of bytes that a socket holds now, which are read. At most SLOTS."""
    try:
        count = len(sock.recv(SLOTS))
    except BlockingIOError:
        return 0
    if count == 0:
        raise ConnectionError("it closed the connection")
    return count


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the peer was faster, or this is the second close
        sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that polls; close would not
    sock.close()
