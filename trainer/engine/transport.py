"""Transports send tensors between two workers; all-reduce algorithms are built on them.

`Transport` is all that an algorithm may know about the machine. `TcpTransport` moves CPU tensors
over its own sockets, without a progress thread: on one host an exchange of 4 KB takes a tenth of
gloo's isend/irecv and large messages three quarters of gloo's all-reduce (benchmarks/allreduce.py).
`NcclTransport` moves CUDA tensors. Sums, wire types and byte counts are not known here.
"""

import contextlib
import secrets
import select
import socket
import struct
import time
from collections import deque
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store

_HELLO = 20  # bytes: 16 of the group's token, 4 of the caller's rank
_HELLO_TIMEOUT_S = 5.0  # a caller that has not sent its token by then is no rank of the group
SILENT_S = 10.0  # a host whose kernel acknowledges nothing for so long is lost
_CHECK_S = 1.0  # between two checks of that, while nothing arrives
_KEEPALIVE = {  # of a connection without traffic: together they take SILENT_S
    "TCP_KEEPIDLE": 4,  # seconds until the first probe
    "TCP_KEEPINTVL": 2,  # seconds between probes
    "TCP_KEEPCNT": 3,  # probes without an answer
}
_TCP_INFO_BYTES = 104  # the part of struct tcp_info that every Linux has


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

    def exchange(self, outgoing: Tensor, to: int, incoming: Tensor, source: int) -> Handle:
        """Start to send `outgoing` to rank `to` and to fill `incoming` from rank `source`.

        Both are contiguous 1-D tensors, and stay untouched until the handle has been waited for.
        Several exchanges may be under way; those between the same two ranks keep their order.
        Sending and receiving are one call because NCCL deadlocks unless it may run them together.
        """
        ...


class _Transfer:
    """The part of one tensor that has not crossed a socket yet."""

    __slots__ = ("rest",)

    def __init__(self, tensor: Tensor) -> None:
        self.rest = memoryview(tensor.view(torch.uint8).numpy().data)


class _Peer:
    """One connection and the transfers that wait for it, in order."""

    __slots__ = ("incoming", "outgoing", "rank", "sock")

    def __init__(self, rank: int, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.rank = rank
        self.sock = sock
        self.outgoing: deque[_Transfer] = deque()
        self.incoming: deque[_Transfer] = deque()

    def push(self) -> bool:
        """Send as much as the socket accepts without waiting. Returns whether anything was sent."""
        moved = False
        while self.outgoing:
            transfer = self.outgoing[0]
            try:
                count = self.sock.send(transfer.rest)
            except BlockingIOError:
                break
            moved = True
            transfer.rest = transfer.rest[count:]
            if not transfer.rest:
                self.outgoing.popleft()
        return moved

    def pull(self) -> bool:
        """Receive what the socket holds now. Returns whether anything moved."""
        moved = False
        while self.incoming:
            transfer = self.incoming[0]
            try:
                count = self.sock.recv_into(transfer.rest)
            except BlockingIOError:
                break
            if count == 0:
                raise ConnectionError("it closed the connection")
            moved = True
            transfer.rest = transfer.rest[count:]
            if not transfer.rest:
                self.incoming.popleft()
        return moved

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


class _TcpExchange:
    """Handle of one exchange, which is done when both tensors have crossed completely."""

    __slots__ = ("_received", "_sent", "_transport")

    def __init__(self, transport: "TcpTransport", sent: _Transfer, received: _Transfer) -> None:
        self._transport = transport
        self._sent = sent
        self._received = received

    def wait(self) -> None:
        while self._sent.rest or self._received.rest:
            self._transport.progress()


class TcpTransport:
    """Stream sockets to every other rank, driven by whichever thread waits.

    Bytes move inside `exchange` and `wait` only; in between, the kernel's socket buffers keep the
    pipeline full. So it is the wait that detects a peer that died or is silent. After such an error
    every further call fails at once, because the streams are no longer in step.
    """

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout_s: float) -> None:
        self.rank = rank
        self.size = len(peers) + 1
        self._peers = {peer: _Peer(peer, sock) for peer, sock in peers.items()}
        self.timeout_s = timeout_s  # limit of each wait, in seconds
        self._error: ConnectionError | TimeoutError | None = None

    def exchange(self, outgoing: Tensor, to: int, incoming: Tensor, source: int) -> Handle:
        self._refuse_if_broken()
        sent, received = _Transfer(outgoing), _Transfer(incoming)
        if received.rest:
            self._peers[source].incoming.append(received)
        if sent.rest:
            self._peers[to].outgoing.append(sent)
            self._move(self._peers[to])
        return _TcpExchange(self, sent, received)

    def progress(self) -> None:
        """Move bytes on every busy connection, after waiting until one of them can."""
        self._refuse_if_broken()
        busy = [peer for peer in self._peers.values() if peer.outgoing or peer.incoming]
        moved = False
        for peer in busy:
            moved |= self._move(peer)
        if moved:
            return
        deadline = time.monotonic() + self.timeout_s
        while not self._poll(busy, min(_CHECK_S, self.timeout_s)):
            for peer in busy:
                if peer.is_silent():
                    self._error = PeerLost(
                        f"rank {self.rank} lost rank {peer.rank}: its host has not answered for "
                        f"{SILENT_S:g} s",
                        peer.rank,
                    )
                    raise self._error
            if time.monotonic() >= deadline:
                names = ", ".join(str(peer.rank) for peer in busy)
                self._error = TimeoutError(
                    f"rank {self.rank} received nothing from rank {names} for {self.timeout_s} s"
                )
                raise self._error

    def close(self) -> None:
        """Close all connections; a thread that waits on them fails at once, and so do the peers."""
        self._error = self._error or ConnectionError(f"rank {self.rank} closed its connections")
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # the peer was faster, or this is the second close
                peer.sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that polls; close would not
            peer.sock.close()

    def _move(self, peer: _Peer) -> bool:
        try:
            return peer.push() | peer.pull()
        except OSError as error:
            if self._error is None:
                message = f"rank {self.rank} lost rank {peer.rank}: {error}"
                self._error = PeerLost(message, peer.rank)
            self._refuse_if_broken(error)
            raise

    def _poll(self, busy: list[_Peer], timeout_s: float) -> bool:
        """Wait until a busy connection can move bytes. Returns False after the time-out."""
        poll = select.poll()
        for peer in busy:
            wanted = (select.POLLIN if peer.incoming else 0) | (
                select.POLLOUT if peer.outgoing else 0
            )
            try:
                poll.register(peer.sock, wanted)
            except ValueError:  # another thread has closed it meanwhile
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


def connect_tcp(rank: int, size: int, store: Store, address: str, timeout_s: float) -> TcpTransport:
    """Connect every pair of ranks; all of them must call this.

    Args:
        rank: Of this process.
        size: Number of ranks.
        store: Through which the ranks exchange their ports, and a token that callers must know.
        address: Of this host, as the others reach it.
        timeout_s: Limit of this call, and of each later wait, in seconds.

    Raises:
        PeerLost: A rank cannot be reached, or has died.
        OSError: Another failure of the network.
        TimeoutError: Not all ranks have connected in time.
    """
    if rank == 0:
        store.set("token", secrets.token_hex(8))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    deadline = time.monotonic() + timeout_s
    peers: dict[int, socket.socket] = {}
    with socket.create_server((address, 0), family=family, backlog=size) as listener:
        store.set(f"address{rank}", f"{address} {listener.getsockname()[1]}")
        token: bytes = store.get("token")
        for peer in range(rank):
            host, port = store.get(f"address{peer}").decode().split()
            try:
                sock = socket.create_connection((host, int(port)), min(timeout_s, SILENT_S))
                sock.sendall(token + rank.to_bytes(4, "little"))
            except OSError as error:
                raise PeerLost.connecting(rank, peer, host, error) from error
            peers[peer] = sock
        while len(peers) < size - 1:
            listener.settimeout(max(0.001, deadline - time.monotonic()))
            sock, _ = listener.accept()
            caller = _read_hello(sock, token)
            if caller is None:
                sock.close()
            else:
                peers[caller] = sock
    for sock in peers.values():
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # macOS lacks one of them
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return TcpTransport(rank, peers, timeout_s)


def _read_hello(sock: socket.socket, token: bytes) -> int | None:
    """The rank of the caller, or None if it does not know the token."""
    sock.settimeout(_HELLO_TIMEOUT_S)
    hello = b""
    try:
        while len(hello) < _HELLO:
            part = sock.recv(_HELLO - len(hello))
            if not part:
                return None
            hello += part
    except OSError:
        return None
    if not secrets.compare_digest(hello[:-4], token):
        return None
    return int.from_bytes(hello[-4:], "little")
