"""Connects the ranks of a group: through shared memory within a host, by TCP between hosts.

A rank listens on a TCP port and on a Unix socket with a random abstract name. A caller that finds
the name is in the same network namespace of the same host; so containers of one host that share no
network use TCP, and need not share /dev/shm. The memory itself has no name: the caller passes its
descriptor, and it ends with the last process that has mapped it, however that process ends.
"""

import contextlib
import mmap
import os
import secrets
import select
import socket
import time
from collections.abc import Iterable

from torch.distributed import Store

from trainer.engine.links import SHARED_BYTES, SILENT_S, Link, SharedLink, TcpLink
from trainer.engine.transport import PeerLost, SocketTransport

_HELLO = 20  # bytes: 16 of the group's token, 4 of the caller's rank
_HELLO_TIMEOUT_S = 5.0  # a caller that has not sent its token by then is no rank of the group
_KEEPALIVE = {  # of a connection without traffic: together they take SILENT_S
    "TCP_KEEPIDLE": 4,  # seconds until the first probe
    "TCP_KEEPINTVL": 2,  # seconds between probes
    "TCP_KEEPCNT": 3,  # probes without an answer
}


def connect_links(
    rank: int, size: int, peers: Iterable[int], store: Store, address: str, timeout_s: float
) -> SocketTransport:
    """Connect the ranks of a group; all of them must call this.

    Args:
        rank: Of this process.
        size: Number of ranks.
        peers: The ranks to connect with; each of them must name this one.
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
    expected = set(peers)
    links: list[Link] = []
    with contextlib.ExitStack() as listening:
        listeners = [socket.create_server((address, 0), family=family, backlog=size)]
        port = listeners[0].getsockname()[1]
        name = "-"
        if hasattr(os, "memfd_create"):  # Linux
            name = secrets.token_hex(16)
            listeners.append(socket.socket(socket.AF_UNIX))
            listeners[1].bind(f"\0{name}")
            listeners[1].listen(size)
        poll = select.poll()
        for listener in listeners:
            listening.enter_context(listener)
            poll.register(listener, select.POLLIN)
        store.set(f"address{rank}", f"{address} {port} {name}")
        token: bytes = store.get("token")
        hello = token + rank.to_bytes(4, "little")
        for peer in sorted(peer for peer in expected if peer < rank):
            host, port, name = store.get(f"address{peer}").decode().split()
            try:
                links.append(
                    _call_local(peer, name, hello)
                    or _call(peer, host, int(port), hello, min(timeout_s, SILENT_S))
                )
            except OSError as error:
                raise PeerLost.connecting(rank, peer, host, error) from error
            expected.discard(peer)
        while expected:
            remaining_s = deadline - time.monotonic()
            ready = poll.poll(max(1, remaining_s * 1000))
            if not ready:
                raise TimeoutError(f"ranks {sorted(expected)} have not connected")
            for listener in listeners:
                if listener.fileno() in dict(ready):
                    link = _answer(listener.accept()[0], token)
                    if link is not None:
                        links.append(link)
                        expected.discard(link.rank)
    return SocketTransport(rank, size, links, timeout_s)


def _call(peer: int, host: str, port: int, hello: bytes, timeout_s: float) -> Link:
    """The link to a rank that listens on a port. Raises OSError if it cannot be reached."""
    sock = socket.create_connection((host, port), timeout_s)
    sock.sendall(hello)
    return _tcp_link(peer, sock)


def _call_local(peer: int, name: str, hello: bytes) -> Link | None:
    """The link to a rank that listens on an abstract name; None if it is not on this host.

    The caller creates the memory, and the socket of the direction to itself.
    """
    if not hasattr(os, "memfd_create"):
        return None
    outbound = socket.socket(socket.AF_UNIX)
    outbound.settimeout(_HELLO_TIMEOUT_S)
    try:
        outbound.connect(f"\0{name}")
    except OSError:
        outbound.close()
        return None
    inbound, theirs = socket.socketpair()
    descriptor = os.memfd_create("all-reduce", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, SHARED_BYTES)
        socket.send_fds(outbound, [hello], [descriptor, theirs.fileno()])
        memory = mmap.mmap(descriptor, SHARED_BYTES)
    finally:
        os.close(descriptor)
        theirs.close()
    return SharedLink(peer, outbound, inbound, memory, first=True)


def _answer(sock: socket.socket, token: bytes) -> Link | None:
    """The link to a caller, or None if it does not know the token."""
    sock.settimeout(_HELLO_TIMEOUT_S)
    local = sock.family == socket.AF_UNIX
    descriptors: list[int] = []
    hello = b""
    with contextlib.suppress(OSError):
        while len(hello) < _HELLO:
            if local:
                part, passed, _, _ = socket.recv_fds(sock, _HELLO - len(hello), 2)
                descriptors += passed
            else:
                part = sock.recv(_HELLO - len(hello))
            if not part:
                break
            hello += part
    known = len(hello) == _HELLO and secrets.compare_digest(hello[:-4], token)
    if known and len(descriptors) == (2 if local else 0):
        rank = int.from_bytes(hello[-4:], "little")
        if not local:
            return _tcp_link(rank, sock)
        memory = mmap.mmap(descriptors[0], SHARED_BYTES)
        os.close(descriptors[0])
        return SharedLink(rank, socket.socket(fileno=descriptors[1]), sock, memory, first=False)
    for descriptor in descriptors:
        os.close(descriptor)
    sock.close()
    return None


def _tcp_link(rank: int, sock: socket.socket) -> Link:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # macOS lacks one of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return TcpLink(rank, sock)
