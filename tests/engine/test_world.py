"""The group of workers: collectives, rendezvous, and the end of every wait."""

import errno
import mmap
import multiprocessing
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer.engine import connect, links
from trainer.engine import world as world_module
from trainer.engine.connect import connect_links
from trainer.engine.links import Link, SharedLink, TcpLink, Transfer
from trainer.engine.rendezvous import RendezvousStore
from trainer.engine.transport import SocketTransport
from trainer.engine.world import World, _interface
from trainer.errors import RunError

CPU = torch.device("cpu")
Ranks = Callable[..., list[Any]]


@pytest.fixture(params=["shared memory", "TCP"])
def ranks(request: pytest.FixtureRequest, ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Ranks:
    """All ranks run on this host; without memfd_create, they connect as on several hosts."""
    if request.param == "TCP":
        monkeypatch.delattr(os, "memfd_create")
    return ranks


def links_of(transport: Any) -> list[Link]:
    return list(transport._links.values())


def test_ranks_of_one_host_share_memory(ranks: Ranks, request: pytest.FixtureRequest) -> None:
    kind = SharedLink if request.node.callspec.params["ranks"] == "shared memory" else TcpLink

    def body(world: World) -> set[type]:
        return {type(link) for link in links_of(world.transport)}

    assert ranks(3, body) == [{kind}] * 3


def test_a_rank_of_another_network_is_reached_by_tcp(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a container of the same host: its abstract names are not found."""
    call = connect._call_local
    monkeypatch.setattr(
        connect,
        "_call_local",
        lambda peer, name, hello: call(peer, "unknown" if peer == 0 else name, hello),
    )

    def body(world: World) -> tuple[torch.Tensor, dict[int, type]]:
        value = torch.arange(100_000) * (world.rank + 1)
        world.all_reduce(value)
        return value, {link.rank: type(link) for link in links_of(world.transport)}

    values, kinds = zip(*ranks(3, body), strict=True)
    assert all(torch.equal(value, torch.arange(100_000) * 6) for value in values)
    near = SharedLink if hasattr(os, "memfd_create") else TcpLink
    assert kinds == (
        {1: TcpLink, 2: TcpLink}, {0: TcpLink, 2: near}, {0: TcpLink, 1: near}
    )  # fmt: skip


@pytest.mark.parametrize("place", [(os, "memfd_create"), (mmap, "mmap"), (socket, "send_fds")])
@pytest.mark.parametrize("ranks", ["shared memory"], indirect=True)
def test_tcp_is_used_where_memory_or_descriptors_are_exhausted(
    ranks: Ranks, place: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*args: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    def body(world: World) -> tuple[list[float], set[type]]:
        value = torch.ones(3)
        world.all_reduce(value)
        return value.tolist(), {type(link) for link in links_of(world.transport)}

    monkeypatch.setattr(*place, exhausted)
    assert ranks(3, body) == [([3, 3, 3], {TcpLink})] * 3


def test_child_processes_inherit_no_connection(ranks: Ranks) -> None:
    """A child that holds a socket would hide from the peer that this process has ended."""

    def body(world: World) -> list[bool]:
        sockets = []
        for link in links_of(world.transport):
            both = (link._outbound, link._inbound) if isinstance(link, SharedLink) else (link,)
            sockets += [direction.sock for direction in both]
        return [os.get_inheritable(sock.fileno()) for sock in sockets]

    for inheritable in ranks(3, body):
        assert not any(inheritable)


def test_broadcast_gives_rank_0_s_values_whatever_type_and_strides(ranks: Ranks) -> None:
    def tensors(seed: int) -> list[torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        return [
            nn.Parameter(torch.randn(2, 3, 4, 5, generator=random)).to(
                memory_format=torch.channels_last
            ),
            nn.Parameter(torch.randn(7, generator=random)),
            torch.randint(0, 99, (3,), generator=random),
            torch.rand(5, generator=random) > 0.5,
            torch.randn((), generator=random, dtype=torch.float64),
            torch.empty(0),
            torch.randn(3, generator=random).bfloat16(),
        ]

    def body(world: World) -> list[torch.Tensor]:
        mine = tensors(seed=world.rank)
        world.broadcast(iter(mine))
        world.broadcast([])
        return mine

    expected = tensors(seed=0)
    for mine in ranks(3, body):
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
        assert [a.stride() for a in mine] == [b.stride() for b in expected]


def test_all_reduce_sums_in_the_tensor_s_type(ranks: Ranks) -> None:
    def body(world: World) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.tensor(2**60 + world.rank)
        value = torch.tensor([1.0, 2.0**-40], dtype=torch.float64) * (world.rank + 1)
        world.all_reduce(count)
        world.all_reduce(value)
        with pytest.raises(ValueError, match="not contiguous"):
            world.all_reduce(torch.ones(4)[::2])
        return count, value

    for count, value in ranks(3, body):
        assert count.item() == 3 * 2**60 + 3
        assert value.tolist() == [6.0, 6 * 2.0**-40]


def test_barrier_waits_for_the_last(ranks: Ranks) -> None:
    arrived: list[int] = []

    def body(world: World) -> int:
        if world.rank == 1:
            time.sleep(0.05)
        arrived.append(world.rank)
        world.barrier()
        return len(arrived)

    assert ranks(3, body) == [3, 3, 3]


def test_a_world_of_one_leaves_tensors_alone() -> None:
    world = World.single(CPU)
    tensor = torch.ones(3)
    world.broadcast([tensor])
    world.all_reduce(tensor)
    world.barrier()
    assert (world.rank, world.size, world.transport.size) == (0, 1, 1)
    assert tensor.tolist() == [1, 1, 1]
    world.close()


def test_a_process_can_join_group_after_group(ranks: Ranks) -> None:
    for size in (2, 3, 2):
        assert ranks(size, lambda world: (world.rank, world.size)) == [
            (rank, size) for rank in range(size)
        ]


def test_connect_can_open_the_port_itself(threads: Ranks) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def body(rank: int) -> int:
        world = World.connect(rank, 2, "127.0.0.1", port, CPU, 10.0)
        world.barrier()
        world.close()
        return world.rank

    assert threads(2, body) == [0, 1]


def test_the_meeting_point_is_open_on_its_host_only() -> None:
    server = World.listen("127.0.0.1")
    with pytest.raises(OSError, match=r"refused|assign|timed out"):
        socket.create_connection(("127.0.0.2", server.port), 1.0).close()


def test_a_missing_rank_ends_in_one_line() -> None:
    server = World.listen("127.0.0.1")
    with pytest.raises(RunError) as error:
        World.connect(0, 2, "127.0.0.1", server.port, CPU, 0.3, server)
    assert str(error.value) == (
        f"rank 0 could not join the group of 2 at 127.0.0.1:{server.port} within 0.3 s: "
        "ranks [1] have not connected"
    )


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The links that were made, by both of their ends."""
    links: list[Any] = []

    def recorded(create: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            links.append(create(*args))
            return links[-1]

        return call

    for name in ("_call_local", "_answer"):
        monkeypatch.setattr(connect, name, recorded(getattr(connect, name)))
    return links


def test_ranks_that_did_connect_learn_that_others_did_not(threads: Ranks, made: list[Any]) -> None:
    """Their links are closed at once, also while somebody keeps the error."""
    server = World.listen("127.0.0.1")
    closed = threading.Event()

    def body(rank: int) -> ConnectionError | None:
        if rank == 2:
            while len(made) < 2:
                time.sleep(0.001)
            closed.set()
            return None
        store = RendezvousStore("127.0.0.1", server.port, 10.0, server.token)
        peers = {0, 1, 2} - {rank}
        with pytest.raises(ConnectionError, match=f"rank {rank} closed its conn") as error:
            connect_links(rank, 3, peers, store, "127.0.0.1", 10.0, closed)
        store.close()
        return error.value

    errors = threads(3, body)
    assert [link._outbound.sock.fileno() for link in made] == [-1, -1]
    assert all(errors[:2])
    server.close()


def test_a_rank_that_could_not_join_leaves_no_connection(
    threads: Ranks, made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(world: World) -> None:
        raise ConnectionError("no barrier")

    server = World.listen("127.0.0.1")
    monkeypatch.setattr(World, "barrier", fails)

    def body(rank: int) -> RunError:
        own = server if rank == 0 else None
        with pytest.raises(RunError, match="within 10 s: no barrier") as error:
            World.connect(rank, 2, "127.0.0.1", server.port, CPU, 10.0, own, server.token)
        return error.value

    errors = threads(2, body)
    assert [link._outbound.sock.fileno() for link in made] == [-1, -1]
    assert all(errors)


def test_a_missing_rendezvous_ends_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(RunError, match="rank 1 could not join the group of 2"):
        World.connect(1, 2, "127.0.0.1", port, CPU, 0.3)


def _all_reduce(world: World) -> None:
    world.all_reduce(torch.ones(3))


def _exchange(world: World) -> None:
    world.transport.exchange(torch.ones(3), 1, torch.ones(3), 1).wait()


@pytest.mark.parametrize("wait", [_all_reduce, _exchange])
@pytest.mark.parametrize("ranks", ["shared memory"], indirect=True)  # a second each
@pytest.mark.slow
def test_a_silent_rank_ends_in_a_time_out(ranks: Ranks, wait: Callable[[World], None]) -> None:
    enough = threading.Event()

    def body(world: World) -> None:
        if world.rank == 1:
            enough.wait(10)
            return
        try:
            message = "no byte moved between rank 0 and rank 1 for 1 s"
            with pytest.raises(TimeoutError, match=message):
                wait(world)
            with pytest.raises(ConnectionError):  # out of step, and so of no more use
                wait(world)
        finally:
            enough.set()

    ranks(2, body, timeout_s=1.0)


def test_a_rank_that_leaves_is_noticed_at_once(ranks: Ranks) -> None:
    def body(world: World) -> None:
        if world.rank == 1:
            return
        with pytest.raises(ConnectionError, match="rank 0 lost rank 1"):
            world.transport.exchange(torch.ones(3), 1, torch.ones(3), 1).wait()

    ranks(2, body, timeout_s=30.0)


def test_large_tensors_are_broadcast_and_summed_in_segments(ranks: Ranks) -> None:
    def body(world: World) -> tuple[torch.Tensor, torch.Tensor]:
        value = torch.arange(300_000) * (world.rank + 1)
        first = value.clone()
        world.broadcast([first])
        world.all_reduce(value)
        return first, value

    for first, value in ranks(3, body):
        assert torch.equal(first, torch.arange(300_000))
        assert torch.equal(value, torch.arange(300_000) * 6)


def _receive(world: World) -> None:
    world.transport.exchange(torch.empty(0), 1, torch.empty(3), 1).wait()


def _broadcast(world: World) -> None:
    world.broadcast([torch.empty(30_000_000)])  # more than the sockets hold


@pytest.mark.parametrize("wait", [_receive, _all_reduce, _broadcast])
def test_closing_in_another_thread_ends_all_waits(
    ranks: Ranks, wait: Callable[[World], None]
) -> None:
    """A worker that is stuck because another one is lost stays usable."""
    enough = threading.Event()

    def body(world: World) -> None:
        if world.rank == 1:
            enough.wait(10)
            return
        threading.Timer(0.05, world.close).start()
        try:
            with pytest.raises(ConnectionError, match="rank 0 closed its connections"):
                wait(world)
        finally:
            enough.set()

    ranks(2, body, timeout_s=30.0)


@pytest.mark.parametrize(
    ("retransmits", "probes", "milliseconds", "silent"),
    [
        (4, 0, 10_500, True),
        (4, 0, 9_000, False),
        (0, 5, 10_500, True),  # this kernel has no route: it probes instead of retransmitting
        (0, 1, 99_000, False),  # the other process is suspended, and its buffer full
        (0, 0, 99_000, False),
    ],
)
def test_a_host_is_lost_only_if_its_kernel_does_not_answer(
    retransmits: int, probes: int, milliseconds: int, silent: bool
) -> None:
    class Socket:
        def setblocking(self, flag: bool) -> None: ...

        def getsockopt(self, level: int, option: int, length: int) -> bytes:
            return struct.pack("2xBB52xI44x", retransmits, probes, milliseconds)

    link = TcpLink(1, Socket())  # type: ignore[arg-type]
    assert link.is_silent() == silent


def test_a_receiver_is_not_woken_for_every_packet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "LOW_WATER_BYTES", 16_384)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sender = socket.create_connection(listener.getsockname())
        link = TcpLink(1, listener.accept()[0])
    incoming = torch.zeros(50_000, dtype=torch.uint8)
    link.incoming.append(Transfer(incoming))
    waits = []
    while link.incoming:
        ((sock, _),) = link.polls()
        waits.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT))
        sender.sendall(bytes([1]) * waits[-1])  # no more: would it wait for that?
        assert select.select([sock], [], [], 10)[0]
        assert link.pull()
    assert waits == [16_384] * 3 + [50_000 - 3 * 16_384]
    assert bool((incoming == 1).all())
    link.close()
    sender.close()


def test_exchanges_hold_more_than_the_sockets_and_keep_their_order(ranks: Ranks) -> None:
    def body(world: World) -> list[list[float]]:
        other = 1 - world.rank
        incoming = [torch.empty(3_000_000) for _ in range(2)]
        handles = [
            world.transport.exchange(torch.full((3_000_000,), number), other, into, other)
            for number, into in zip((1.0, 2.0), incoming, strict=True)
        ]
        for handle in reversed(handles):
            handle.wait()
        return [into.unique().tolist() for into in incoming]

    assert ranks(2, body) == [[[1.0], [2.0]]] * 2


def test_strangers_are_turned_away(threads: Ranks) -> None:
    server = World.listen("127.0.0.1")

    def body(rank: int) -> None:
        mine = RendezvousStore("127.0.0.1", server.port, 5.0, server.token)
        if rank == 2:
            host, port, name = mine.get("address0").decode().split()
            by_tcp, local = (
                socket.create_connection((host, int(port))),
                socket.socket(socket.AF_UNIX),
            )
            local.connect(f"\0{name}")
            for stranger in (by_tcp, local):
                stranger.sendall(bytes(20))
                assert stranger.recv(1) == b""
                stranger.close()
            mine.set("turned away", "")
            return
        if rank == 1:
            mine.wait(["turned away"])
        transport = connect_links(rank, 2, [1 - rank], mine, "127.0.0.1", 5.0)
        incoming = torch.zeros(2)
        transport.exchange(torch.ones(2), 1 - rank, incoming, 1 - rank).wait()
        assert incoming.tolist() == [1, 1]
        transport.close()

    threads(3, body)


def test_the_interface_of_an_address() -> None:
    """NCCL is told its name."""
    assert _interface("127.0.0.1") == "lo"
    if "lo" in Path("/proc/net/if_inet6").read_text():
        assert _interface("::1") == "lo"
    for address in ("192.0.2.1", "2001:db8::1"):  # of documentation: nobody has them
        with pytest.raises(OSError, match=f"no network interface .* {address}"):
            _interface(address)


def test_a_group_of_one_has_no_connections() -> None:
    """NCCL's group would take a second and some hundred MB of the GPU."""
    server = World.listen("127.0.0.1")
    world = World.connect(0, 1, "127.0.0.1", server.port, CPU, 5.0, server)
    assert world._gloo is None
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), 1.0)
    tensor = torch.ones(3)
    world.broadcast([tensor])
    world.all_reduce(tensor)
    world.barrier()
    assert tensor.tolist() == [1, 1, 1]
    assert world.side_transport() is world.transport
    world.close()


def test_a_large_group_connects_to_everybody_only_where_needed(ranks: Ranks) -> None:
    def body(world: World) -> tuple[int, int, list[bytes]]:
        mesh = world.mesh_transport()
        assert world.mesh_transport() is mesh
        counts = [len(links_of(one)) for one in (world.transport, mesh)]
        return *counts, world.gather(bytes([world.rank]) * world.rank)

    gathered = [bytes([rank]) * rank for rank in range(9)]
    assert ranks(3, body) == [(2, 2, gathered[:3]), (2, 2, []), (2, 2, [])]
    results = ranks(9, body)
    assert [result[1:] for result in results] == [(8, gathered)] + [(8, [])] * 8
    assert [result[0] for result in results] == [4] * 8 + [2]


def test_the_two_transports_are_used_at_the_same_time(ranks: Ranks) -> None:
    def body(world: World) -> list[list[float]]:
        both = (world.transport, world.side_transport())
        assert world.side_transport() is both[1]
        peer = 1 - world.rank
        received = [torch.zeros(2), torch.zeros(2)]
        handles = [
            transport.exchange(torch.full((2,), n + 10.0 * world.rank), peer, received[n], peer)
            for n, transport in enumerate(both)
        ]
        for handle in reversed(handles):
            handle.wait()
        world.close()
        with pytest.raises(ConnectionError):
            both[1].exchange(torch.ones(2), peer, received[0], peer).wait()
        return [into.tolist() for into in received]

    assert ranks(2, body) == [[[10, 10], [11, 11]], [[0, 0], [1, 1]]]


def test_connecting_another_transport_does_not_look_like_a_hang(ranks: Ranks) -> None:
    worlds: dict[int, World] = {}

    def body(world: World) -> bool:
        worlds[world.rank] = world
        world.barrier()
        busy = False
        if world.rank == 1:
            end = time.monotonic() + 5
            while not busy and time.monotonic() < end:
                busy = worlds[0].heartbeat.is_busy
        world.side_transport()
        assert not world.heartbeat.is_busy
        return busy

    assert ranks(2, body) == [False, True]


@pytest.mark.parametrize("alone", [0, 1])
def test_closing_ends_the_wait_for_ranks_that_do_not_connect(ranks: Ranks, alone: int) -> None:
    """Rank 0 waits for a call from the other one, which waits for the address of rank 0."""
    enough = threading.Event()

    def body(world: World) -> None:
        if world.rank != alone:
            enough.wait(10)
            return
        threading.Timer(0.05, world.close).start()
        try:
            for _ in range(2):
                with pytest.raises(ConnectionError, match=f"rank {alone} closed its connections"):
                    world.side_transport()
            assert not world.heartbeat.is_busy
        finally:
            enough.set()

    ranks(2, body, timeout_s=30.0)


def test_a_world_that_is_closed_while_it_connects_leaves_no_transport_open(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds: dict[int, World] = {}

    def connect_and_close(rank: int, *args: Any) -> SocketTransport:
        transport = connect_links(rank, *args)
        if rank in worlds:
            worlds[rank].close()
        return transport

    monkeypatch.setattr(world_module, "connect_links", connect_and_close)

    def body(world: World) -> None:
        worlds[world.rank] = world
        transport = world.side_transport()
        with pytest.raises(ConnectionError, match=f"rank {world.rank} closed its connections"):
            transport.exchange(torch.ones(1), 1 - world.rank, torch.ones(1), 1 - world.rank)

    ranks(2, body)


def test_an_error_of_the_network_is_a_lost_connection(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver starts a new group then, whereas after other errors it ends the run."""

    def body(world: World) -> None:
        world.barrier()
        monkeypatch.setattr(world_module, "connect_links", unreachable)
        message = "the side transport failed on rank . of 2: .* Network is unreachable"
        with pytest.raises(ConnectionError, match=message):
            world.side_transport()

    def unreachable(*args: Any) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    ranks(2, body)


def _die_after_joining(port: int, token: str) -> None:
    World.connect(1, 2, "127.0.0.1", port, CPU, 20.0, token=token)
    os._exit(1)


@pytest.mark.integration
def test_a_killed_process_is_noticed_at_once() -> None:
    server = World.listen("127.0.0.1")
    peer = multiprocessing.get_context("spawn").Process(
        target=_die_after_joining, args=(server.port, server.token)
    )
    peer.start()
    world = World.connect(0, 2, "127.0.0.1", server.port, CPU, 60.0, server)
    peer.join()
    with pytest.raises(ConnectionError):
        world.transport.exchange(torch.ones(3), 1, torch.ones(3), 1).wait()
    with pytest.raises(ConnectionError):
        world.all_reduce(torch.ones(3))
    world.close()
