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
import threading
import time
from collections.abc import Iterable

from torch.distributed import Store

from trainer.engine.links import SHARED_BYTES, SILENT_S, Link, SharedLink, TcpLink
from trainer.engine.transport import PeerLost, SocketTransport

_HELLO = 20  # bytes: 16 of the group's token, 4 of the caller's rank
_HELLO_TIMEOUT_S = 5.0  # a caller that has not sent its token by then is no rank of the group
_CHECK_S = 0.1  # between two looks at the clock and at `closed`, while no rank calls
_KEEPALIVE = {  # of a connection without traffic: together they take SILENT_S
    "TCP_KEEPIDLE": 4,  # seconds until the first probe
    "TCP_KEEPINTVL": 2,  # seconds between probes
    "TCP_KEEPCNT": 3,  # probes without an answer
}


def connect_links(
    rank: int,
    size: int,
    peers: Iterable[int],
    store: Store,
    address: str,
    timeout_s: float,
    closed: threading.Event | None = None,
) -> SocketTransport:
    """Connect the ranks of a group; all of them must call this. Returns when this one is connected.

    Args:
        rank: Of this process.
        size: Number of ranks.
        peers: The ranks to connect with; each of them must name this one.
        store: Through which the ranks exchange their ports, and a token that callers must know.
        address: Of this host, as the others reach it.
        timeout_s: Limit of this call, apart from waits for the store, and of each later wait of the
            transport, in seconds.
        closed: If another thread sets it, the call ends with a ConnectionError, unless it waits for
            the store: that has to be closed, too.

    Raises:
        PeerLost: A rank cannot be reached, or has died.
        ConnectionError: The store, or `closed`, has ended the call.
        TimeoutError: Not all ranks have connected in time.
        OSError: Another failure of the network.
    """
    if rank == 0:
        store.set("token", secrets.token_hex(8))
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    deadline = time.monotonic() + timeout_s
    expected = set(peers)
    links: list[Link] = []
    with contextlib.ExitStack() as failed, contextlib.ExitStack() as listening:
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

        def add(link: Link) -> None:
            failed.callback(link.close)
            links.append(link)
            expected.discard(link.rank)

        for peer in sorted(peer for peer in expected if peer < rank):
            host, port, name = store.get(f"address{peer}").decode().split()
            try:
                add(
                    _call_local(peer, name, hello)
                    or _call(peer, host, int(port), hello, min(timeout_s, SILENT_S))
                )
            except OSError as error:
                raise PeerLost.connecting(rank, peer, host, error) from error
        while expected:
            ready = dict(poll.poll(_CHECK_S * 1000))
            if closed is not None and closed.is_set():
                raise ConnectionError(f"rank {rank} closed its connections")
            for listener in listeners:
                if listener.fileno() in ready:
                    link = _answer(listener.accept()[0], token)
                    if link is not None:
                        add(link)
            if expected and time.monotonic() >= deadline:
                raise TimeoutError(f"ranks {sorted(expected)} have not connected")
        failed.pop_all()
    return SocketTransport(rank, size, links, timeout_s)


def _call(peer: int, host: str, port: int, hello: bytes, timeout_s: float) -> Link:
    """The link to a rank that listens on a port. Raises OSError if it cannot be reached."""
    sock = socket.create_connection((host, port), timeout_s)
    sock.sendall(hello)
    return _tcp_link(peer, sock)


def _call_local(peer: int, name: str, hello: bytes) -> Link | None:
    """The link to a rank that listens on an abstract name; None: use TCP.

    That is so if the rank is not on this host, or if memory or descriptors are exhausted. The
    caller creates the memory, and the socket of the direction to itself.
    """
    if not hasattr(os, "memfd_create"):
        return None
    with contextlib.suppress(OSError), contextlib.ExitStack() as failed:
        outbound = failed.enter_context(socket.socket(socket.AF_UNIX))
        outbound.settimeout(_HELLO_TIMEOUT_S)
        outbound.connect(f"\0{name}")
        inbound, theirs = socket.socketpair()
        failed.enter_context(inbound)
        with theirs, os.fdopen(os.memfd_create("all-reduce"), "wb") as file:
            file.truncate(SHARED_BYTES)
            memory = mmap.mmap(file.fileno(), SHARED_BYTES)
            # Nothing may fail from here on: the other rank expects no call by TCP.
            socket.send_fds(outbound, [hello], [file.fileno(), theirs.fileno()])
        failed.pop_all()
        return SharedLink(peer, outbound, inbound, memory, first=True)
    return None


def _answer(sock: socket.socket, token: bytes) -> Link | None:
    """The link to a caller, or None if it does not know the token.

    Raises:
        OSError: The caller's memory cannot be mapped.
    """
    sock.settimeout(_HELLO_TIMEOUT_S)
    local = sock.family == socket.AF_UNIX
    descriptors: list[int] = []
    hello = b""
    with contextlib.ExitStack() as failed:
        failed.enter_context(sock)
        with contextlib.suppress(OSError):
            while len(hello) < _HELLO:
                if local:
                    part, passed, _, _ = socket.recv_fds(sock, _HELLO - len(hello), 2)
                    for descriptor in passed:
                        failed.callback(os.close, descriptor)
                        os.set_inheritable(descriptor, False)
                    descriptors += passed
                else:
                    part = sock.recv(_HELLO - len(hello))
                if not part:
                    break
                hello += part
        known = len(hello) == _HELLO and secrets.compare_digest(hello[:-4], token)
        if not known or len(descriptors) != (2 if local else 0):
            return None
        rank = int.from_bytes(hello[-4:], "little")
        if not local:
            failed.pop_all()
            return _tcp_link(rank, sock)
        memory = mmap.mmap(descriptors[0], SHARED_BYTES)
        failed.pop_all()
    os.close(descriptors[0])
    return SharedLink(rank, socket.socket(fileno=descriptors[1]), sock, memory, first=False)


def _tcp_link(rank: int, sock: socket.socket) -> Link:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # macOS lacks one of them
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return TcpLink(rank, sock)
