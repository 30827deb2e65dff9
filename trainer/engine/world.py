"""The group of workers as one of them sees it: its rank, and what all of them do together.

CPU tensors travel over our own links (links.py): another thread can end their waits at once
by `World.close`, whereas a collective of gloo waits until its time-out. CUDA tensors travel over
NCCL, which needs torch's default group. A warm worker can join group after group, and a test can
run all ranks in one process. Gradients take another way (reducer.py, over `World.transport`).
"""

import contextlib
import fcntl
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore

from trainer.engine.connect import connect_links
from trainer.engine.heartbeat import Heartbeat
from trainer.engine.rendezvous import RendezvousServer, RendezvousStore
from trainer.engine.ring import RingAllReduce, broadcast, gather, neighbours
from trainer.engine.transport import NcclTransport, PeerLost, SocketTransport, Transport
from trainer.errors import RunError
from trainer.messages import Handover

_SIOCGIFADDR = 0x8915  # ioctl: the IPv4 address of a network interface (netdevice(7))


class World:
    """One rank's place in a group of `size` ranks; made by `single` or `connect`.

    All ranks call the same methods in the same order, with tensors of the same shapes and types.
    Every wait ends, at the latest after the time-out given to `connect`: with TimeoutError when
    nothing came, with ConnectionError when a rank is known to be gone, or when another thread calls
    `close`. The group is of no use after that; close it. In a group of one, every collective leaves
    its tensors alone.

    Attributes:
        rank: Of this process, from 0.
        size: Number of ranks.
        device: Where this rank computes.
        transport: For the algorithms of ring.py. Do not use it while a collective is running.
        heartbeat: Progress of this rank. It is busy while a method of this class waits for others.
        stop: Set from outside: the run should end at its next step.
        change: Set from outside: the run should continue in another group.
        kept: On rank 0: the state from which a new group continues.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        sockets: SocketTransport,
        transport: Transport,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.transport = transport
        self.heartbeat = Heartbeat()
        self.stop = threading.Event()
        self.change = threading.Event()
        self.kept: Handover | None = None
        self._sockets = sockets  # moves CPU tensors; on the CPU it is `transport`
        self._gloo: Any = None  # a ProcessGroupGloo, whose methods torch's type stubs leave out
        self._store: RendezvousStore | None = None
        self._server: RendezvousServer | None = None  # on rank 0
        self._address = ""
        self._timeout_s = 0.0
        self._others: dict[str, SocketTransport] = {}
        self._closed = threading.Event()

    @classmethod
    def single(cls, device: torch.device) -> "World":
        """The group of one: no process group, no connection."""
        alone = SocketTransport(0, 1, [], 0.0)
        return cls(0, 1, device, alone, alone)

    @staticmethod
    def listen(host: str) -> RendezvousServer:
        """Open the rendezvous of a new group, in the process that will be rank 0.

        Args:
            host: An address of this machine that all ranks can reach; only there it listens.

        Returns:
            The server. All ranks need its `port` and its `token`, on a way that strangers cannot
            read; rank 0 passes the server itself to `connect`.

        Raises:
            OSError: `host` is not an address of this machine.
        """
        return RendezvousServer(host, token=secrets.token_hex(16))

    @classmethod
    def connect(
        cls,
        rank: int,
        size: int,
        host: str,
        port: int,
        device: torch.device,
        timeout_s: float,
        server: RendezvousServer | None = None,
        token: str = "",
        wait_s: float | None = None,
    ) -> "World":
        """Join a group; returns when all its ranks are there.

        All traffic is bound to the network interface that leads to `host`, which is the loopback
        for 127.0.0.1. Only ranks that know the token learn the addresses of the others and exchange
        tensors with them; gloo's and NCCL's own connections know no secret. On CUDA this sets the
        current device of the process, and torch's default process group is NCCL's.

        Args:
            rank: Of this process.
            size: Number of ranks.
            host: Where the rendezvous listens.
            port: Likewise.
            device: Where this rank computes.
            timeout_s: Limit of each wait within this call, in seconds.
            server: What `listen` returned, on rank 0; without it rank 0 opens `port` itself.
            token: Of the server.
            wait_s: Limit of each later wait, in seconds; None: `timeout_s`.

        Raises:
            RunError: The group was not complete in time. Its cause is a PeerLost if a certain rank
                could not be reached.
        """
        wait_s = timeout_s if wait_s is None else wait_s
        limit = timedelta(seconds=wait_s)
        opened = contextlib.ExitStack()  # closes what has been opened
        try:
            if size == 1:
                return cls._connect_one(device, server)
            if server is not None:
                token = server.token
            elif rank == 0:
                server = RendezvousServer(host, port, token)
            if server is not None:
                opened.callback(server.close)
            try:
                store = RendezvousStore(host, port, timeout_s, token)
            except OSError as error:
                raise PeerLost.connecting(rank, 0, host, error) from error
            opened.callback(store.close)
            address = _own_address(host, port)
            sockets = connect_links(
                rank, size, neighbours(rank, size), PrefixStore("ring", store), address, timeout_s
            )
            opened.callback(sockets.close)
            transport: Transport = sockets
            if device.type == "cuda":
                same_bits_on_cuda()
                torch.cuda.set_device(device)
                os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={_interface(address)}")
                dist.init_process_group(
                    "nccl",
                    store=_nccl_store(rank, host, store, limit),
                    rank=rank,
                    world_size=size,
                    timeout=limit,
                    device_id=device,
                )
                transport = NcclTransport()
            world = cls(rank, size, device, sockets, transport)
            opened.callback(world.close)
            world._store, world._server = store, server
            world._address, world._timeout_s = address, wait_s
            world.barrier()
            sockets.timeout_s = wait_s
        except (RuntimeError, OSError) as error:
            opened.close()
            raise RunError(
                f"rank {rank} could not join the group of {size} at {host}:{port} "
                f"within {timeout_s:g} s: {error}"
            ) from error
        return world

    @classmethod
    def _connect_one(cls, device: torch.device, server: RendezvousServer | None) -> "World":
        """The group of one: NCCL and gloo would only take time and memory."""
        if server is not None:
            server.close()
        if device.type == "cuda":
            same_bits_on_cuda()
            torch.cuda.set_device(device)
        return cls.single(device)

    def side_transport(self) -> Transport:
        """A second transport, for use at the same time as `transport`, by another thread.

        It lasts as long as the world. The first call connects it: a collective call that blocks
        until all ranks have made it. Later calls return at once. On CUDA it is `transport` itself.

        Raises:
            ConnectionError: A rank is gone or cannot be reached, or another thread calls `close`.
            TimeoutError: A rank has not called this in time.
        """
        return self._other_transport("side", neighbours(self.rank, self.size))

    def mesh_transport(self) -> Transport:
        """A transport to every rank; `transport` reaches those that the ring module needs.

        It is `transport` itself in small groups. Lifetime, first call and errors as of
        `side_transport`.
        """
        everybody = set(range(self.size)) - {self.rank}
        if everybody == neighbours(self.rank, self.size):
            return self.transport
        return self._other_transport("mesh", everybody)

    def _other_transport(self, name: str, peers: set[int]) -> Transport:
        if self.device.type == "cuda" or self.size == 1:
            return self.transport  # NCCL orders what one thread launches, and connects by itself
        if name not in self._others:
            with self.heartbeat.busy(), self._named_errors(f"the {name} transport"):
                store, address = self._prefixed_store(name), self._address
                self._others[name] = connect_links(
                    self.rank, self.size, peers, store, address, self._timeout_s, self._closed
                )
            if self._closed.is_set():  # by another thread, which may not have seen this one
                self._others[name].close()
        return self._others[name]

    @torch.no_grad()
    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give all ranks rank 0's values, in place; any types, shapes and strides, one device.

        On the CPU it blocks until this rank has its values; on CUDA until the work is launched.
        """
        targets = list(tensors)
        if self.size == 1 or not targets:
            return
        parts = [target.detach().reshape(-1).view(torch.uint8) for target in targets]
        flat = torch.cat(parts)
        with self.heartbeat.busy():
            if flat.is_cuda:
                with self._named_errors("broadcast"):
                    dist.broadcast(flat, 0)
            else:
                broadcast(self._sockets, flat)
        values = torch.split(flat, [len(part) for part in parts])
        for target, value in zip(targets, values, strict=True):
            target.copy_(value.clone().view(target.dtype).view(target.shape))

    def gather(self, content: bytes) -> list[bytes]:
        """The bytes of all ranks, in their order, on rank 0; on the others an empty list."""
        if self.size == 1:
            return [content]
        lengths = torch.zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(content)
        self.all_reduce(lengths)
        own = torch.from_numpy(np.frombuffer(bytearray(content), np.uint8))
        with self.heartbeat.busy():
            parts = gather(self._sockets, own, lengths.tolist())
        return [part.numpy().tobytes() for part in parts]

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum a contiguous tensor over all ranks, in its own type, in place; blocks until done.

        Raises:
            ValueError: The tensor is not contiguous.
        """
        if self.size == 1:
            return
        _check_contiguous(tensor)
        with self.heartbeat.busy():
            if tensor.is_cuda:
                with self._named_errors("all-reduce"):
                    dist.all_reduce(tensor)
                    # The wait for a silent rank belongs here, where it does not look like a hang of
                    # this one, and not where the caller reads the result.
                    torch.cuda.current_stream().synchronize()
            else:
                RingAllReduce(self._sockets, tensor.dtype).sum_(tensor.view(-1))

    def native_all_reduce(self, tensor: Tensor) -> None:
        """As `all_reduce`, by gloo or NCCL; on CUDA only put the work on the current stream.

        Gloo's own connections are made in the first call, which is a collective one.
        """
        if self.size == 1:
            return
        _check_contiguous(tensor)
        with self.heartbeat.busy(), self._named_errors("all-reduce"):
            if tensor.is_cuda:
                dist.all_reduce(tensor)
            else:
                if self._gloo is None:
                    self._gloo = self._new_gloo()
                self._gloo.allreduce([tensor], dist.AllreduceOptions()).wait()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce(torch.zeros(1))

    def close(self) -> None:
        """Leave the group at once, without waiting for the others; more than once does no harm.

        Another thread may call it: waits for other ranks then end with a ConnectionError, but that
        of `native_all_reduce` by gloo, which cannot be interrupted, only when the others leave or
        after its time-out.
        """
        self._closed.set()  # first, so that a transport that connects meanwhile is closed, too
        self._sockets.close()
        for other in list(self._others.values()):
            other.close()
        if isinstance(self.transport, NcclTransport) and dist.is_initialized():
            # destroy_process_group would wait for kernels, and they for ranks that are gone.
            dist.distributed_c10d._abort_process_group()
        for end in (self._store, self._server):
            if end is not None:
                end.close()
        self._gloo = self._store = self._server = None

    def _new_gloo(self) -> Any:
        """A gloo group on our interface; left alone, gloo trusts the name of the host."""
        group: Any = dist.ProcessGroupGloo
        options = group._Options()
        options._timeout = timedelta(seconds=self._timeout_s)
        options._devices = [group.create_device(hostname=self._address)]
        return group(self._prefixed_store("gloo"), self.rank, self.size, options)

    def _prefixed_store(self, name: str) -> PrefixStore:
        store = self._store
        if store is None or self._closed.is_set():
            raise ConnectionError(f"rank {self.rank} closed its connections")
        return PrefixStore(name, store)

    @contextlib.contextmanager
    def _named_errors(self, what: str) -> Iterator[None]:
        """Turn errors of the back end or the network into the two that this class promises."""
        try:
            yield
        except (RuntimeError, OSError) as error:
            if self._closed.is_set():  # by another thread: that is why it failed
                raise ConnectionError(f"rank {self.rank} closed its connections") from error
            if isinstance(error, ConnectionError | TimeoutError):
                raise
            kind = TimeoutError if "imed out" in str(error) else ConnectionError
            raise kind(f"{what} failed on rank {self.rank} of {self.size}: {error}") from error


def same_bits_on_cuda() -> None:
    """Let CUDA's libraries take algorithms that give equal bits for equal inputs; before first use.

    Operations that have none warn. (https://docs.pytorch.org/docs/stable/notes/randomness.html)
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that takes time; torch makes the module a class with a property.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False


def _check_contiguous(tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"cannot sum a tensor of strides {tensor.stride()}: not contiguous")


def _nccl_store(rank: int, host: str, store: RendezvousStore, limit: timedelta) -> TCPStore:
    """NCCL's own store, since its watchdog needs more than a `RendezvousStore` offers."""
    if rank == 0:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)  # on this address only
        port = listener.getsockname()[1]
        nccl = TCPStore(
            host,
            port,
            is_master=True,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        store.set("nccl", str(port))
        return nccl
    return TCPStore(host, int(store.get("nccl")), is_master=False, timeout=limit)


def _interface(address: str) -> str:
    """The name of the network interface that has an address of this machine, such as "eth0".

    Raises:
        OSError: No interface has it.
    """
    if ":" in address:
        wanted = socket.inet_pton(socket.AF_INET6, address).hex()
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            number, *_, name = line.split()
            if number == wanted:
                return name
    else:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # the interface has no IPv4 address
                    request = struct.pack("256s", name.encode())  # a struct ifreq
                    answer = fcntl.ioctl(sock, _SIOCGIFADDR, request)
                    if socket.inet_ntoa(answer[20:24]) == address:
                        return name
    raise OSError(f"no network interface of this machine has the address {address}")


def _own_address(host: str, port: int) -> str:
    """The address of this machine from which packets to `host` leave. Sends nothing."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
