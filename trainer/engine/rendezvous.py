"""The key-value store through which the ranks of a new group exchange their addresses.

`RendezvousServer` runs in the process of rank 0; every rank, rank 0 included, connects to it with a
`RendezvousStore`. It replaces torch's TCPStore, whose clients look up the name of the server's
address for a log message. Without a name server that takes 6 s per process.
"""

import contextlib
import secrets
import socket
import struct
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import Store

_REQUEST = struct.Struct("<cdII")  # operation, time-out in seconds, bytes of the key, of the value
_REPLY = struct.Struct("<cI")  # whether the key was there, bytes of the value
_SET, _GET = b"S", b"G"
_FOUND, _MISSING = b"F", b"M"
_MAX_BYTES = 1 << 20  # of a key or a value; addresses take less than a kilobyte
_TOKEN_TIMEOUT_S = 5.0  # a client that has not sent the token by then is no rank of the group
_ANSWER_S = 10.0  # in which the kernel of a host that can be reached accepts or refuses
_RETRY_S = 0.1  # between two attempts to connect while nobody listens


class RendezvousServer:
    """Serves the values of one group to its ranks until it is closed."""

    def __init__(self, host: str, port: int = 0, token: str = "") -> None:
        """Listen on `host` only.

        Args:
            host: An address of this machine that all ranks can reach.
            port: The port; 0: the system chooses one.
            token: A secret that clients must know.

        Raises:
            OSError: `host` is not an address of this machine, or the port is in use.
        """
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, port), family=family)
        self.port: int = self._listener.getsockname()[1]
        self.token = token
        self._values: dict[bytes, bytes] = {}
        self._changed = threading.Condition()
        self._connections: list[socket.socket] = []
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True, name="rendezvous").start()

    def close(self) -> None:
        """End all connections. May be called twice."""
        self._closed.set()  # first, so that a connection that is accepted meanwhile ends, too
        for sock in (self._listener, *self._connections):
            _close(sock)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._connections.append(sock)
            if self._closed.is_set():  # `close` may not have seen this one
                _close(sock)
                return
            threading.Thread(
                target=self._serve, args=(sock,), daemon=True, name="rendezvous"
            ).start()

    def _serve(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):  # the client left, or never was one
            sock.settimeout(_TOKEN_TIMEOUT_S)
            token = self.token.encode()
            known = secrets.compare_digest(_receive(sock, len(token)), token)
            sock.settimeout(None)
            while known:
                operation, timeout_s, key_bytes, value_bytes = _REQUEST.unpack(
                    _receive(sock, _REQUEST.size)
                )
                if max(key_bytes, value_bytes) > _MAX_BYTES:
                    break  # not a rank of the group
                key, value = _receive(sock, key_bytes), _receive(sock, value_bytes)
                if operation == _SET:
                    with self._changed:
                        self._values[key] = value
                        self._changed.notify_all()
                else:
                    found = self._get(key, timeout_s)
                    status = _MISSING if found is None else _FOUND
                    sock.sendall(_REPLY.pack(status, len(found or b"")) + (found or b""))
        sock.close()

    def _get(self, key: bytes, timeout_s: float) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, timeout_s)
            return self._values.get(key)


class RendezvousStore(Store):
    """The connection of one rank to the server, with the methods that torch's gloo calls."""

    def __init__(self, host: str, port: int, timeout_s: float, token: str = "") -> None:
        """Connect, and wait for the server if it does not listen yet.

        Args:
            host: The address of the server.
            port: The port of the server.
            timeout_s: Limit of this call, and of each wait for a key, in seconds.
            token: The secret of the server.

        Raises:
            OSError: The server cannot be reached within the time-out.
        """
        super().__init__()
        self._timeout_s = timeout_s
        self._lock = threading.Lock()  # one request at a time
        self._sock = _connect(host, port, timeout_s)
        self._sock.sendall(token.encode())

    def set(self, key: str, value: Any) -> None:
        """Store a value under a key. Returns without waiting until the server has it."""
        content = value.encode() if isinstance(value, str) else bytes(value)
        with self._lock:
            self._request(_SET, key, content, self._timeout_s)

    def get(self, key: str) -> bytes:
        """Return the value of a key, after waiting until some rank has set it.

        Raises:
            TimeoutError: No rank has set it within the time-out.
            ConnectionError: The server, or `close` in another thread, has ended the connection.
        """
        return self._get(key, self._timeout_s)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return when all keys are set. Raises as `get`."""
        for key in keys:
            self._get(key, self._timeout_s if timeout is None else timeout.total_seconds())

    def close(self) -> None:
        """Disconnect; a thread that waits for a value fails at once. May be called twice."""
        _close(self._sock)

    def _get(self, key: str, timeout_s: float) -> bytes:
        with self._lock:
            try:
                self._request(_GET, key, b"", timeout_s)
                status, length = _REPLY.unpack(_receive(self._sock, _REPLY.size))
                value = _receive(self._sock, length)
            except TimeoutError:
                raise
            except (EOFError, OSError) as error:
                raise ConnectionError("the connection to the rendezvous is closed") from error
        if status == _MISSING:
            raise TimeoutError(f"no rank has set {key} within {timeout_s:g} s")
        return value

    def _request(self, operation: bytes, key: str, value: bytes, timeout_s: float) -> None:
        # The server ends a wait itself; the margin covers the way to it and back.
        self._sock.settimeout(timeout_s + 5)
        name = key.encode()
        head = _REQUEST.pack(operation, timeout_s, len(name), len(value))
        self._sock.sendall(head + name + value)


def _connect(host: str, port: int, timeout_s: float) -> socket.socket:
    deadline = time.monotonic() + timeout_s
    while True:
        remaining = deadline - time.monotonic()
        try:
            return socket.create_connection((host, port), max(min(remaining, _ANSWER_S), 0.001))
        except ConnectionRefusedError:
            if remaining <= _RETRY_S:
                raise
            time.sleep(_RETRY_S)


def _close(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # closed by the peer, or before
        sock.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for it; close would not
    sock.close()


def _receive(sock: socket.socket, count: int) -> bytes:
    """Read exactly `count` bytes. Raises EOFError if the connection ends before."""
    content = bytearray()
    while len(content) < count:
        part = sock.recv(count - len(content))
        if not part:
            raise EOFError
        content += part
    return bytes(content)
