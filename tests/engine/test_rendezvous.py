"""The store of a rendezvous: values for all ranks, limits of every wait, no name look-ups."""

import os
import queue
import shutil
import socket
import subprocess
import sys
import threading
from unittest import mock

import pytest

from trainer.engine.rendezvous import RendezvousServer, RendezvousStore

HOST = "127.0.0.1"


@pytest.fixture
def server():
    server = RendezvousServer(HOST)
    yield server
    server.close()


def test_a_value_reaches_the_ranks_that_wait_for_it(server):
    first, second = (RendezvousStore(HOST, server.port, 10) for _ in range(2))
    threading.Timer(0.05, first.set, ["key", "value"]).start()
    second.wait(["key"])
    assert second.get("key") == b"value"
    first.set("key", b"\0" * 100_000)
    assert first.get("key") == b"\0" * 100_000  # until then, the server may not have received it
    assert second.get("key") == b"\0" * 100_000


def test_a_store_waits_for_its_server():
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    opened: queue.Queue[RendezvousServer] = queue.Queue()
    threading.Timer(0.2, lambda: opened.put(RendezvousServer(HOST, port))).start()
    RendezvousStore(HOST, port, 10).set("key", "value")
    # The store connects before the constructor of the server has returned.
    opened.get(timeout=10).close()


def test_every_wait_has_a_limit(server):
    store = RendezvousStore(HOST, server.port, 0.1)
    with pytest.raises(TimeoutError, match=r"no rank has set key within 0\.1 s"):
        store.get("key")
    store.set("key", "value")  # the connection remains usable
    assert store.get("key") == b"value"
    server.close()
    server.close()  # may be called twice
    with pytest.raises(OSError, match=r"closed|reset|Broken"):
        store.get("key")
    with pytest.raises(ConnectionRefusedError):
        RendezvousStore(HOST, server.port, 0.1)


def test_closing_in_another_thread_ends_a_wait(server):
    store = RendezvousStore(HOST, server.port, 30)
    threading.Timer(0.05, store.close).start()
    with pytest.raises(ConnectionError, match="the connection to the rendezvous is closed"):
        store.get("key")
    store.close()  # may be called twice


def test_a_client_that_is_accepted_while_the_server_closes_is_disconnected(server):
    """Otherwise it would wait until its time-out for values that nobody can set."""
    client, accepted = socket.socketpair()
    client.settimeout(5)
    server.close()
    with mock.patch.object(server, "_listener") as listener:
        listener.accept.side_effect = [(accepted, None), OSError]
        server._accept()
    assert client.recv(1) == b""
    client.close()


@pytest.mark.parametrize("request_", [b"nonsense", b"\xff" * 17, b"G" + b"\0" * 8 + b"\xff" * 8])
def test_other_clients_disturb_no_rank(server, request_):
    with socket.create_connection((HOST, server.port)) as other:
        other.sendall(request_)
        store = RendezvousStore(HOST, server.port, 10)
        store.set("key", "value")
        assert store.get("key") == b"value"


@pytest.mark.parametrize("token", ["", "wrong", "secret"])
def test_only_clients_that_know_the_token_are_served(token):
    server = RendezvousServer(HOST, token="secret")
    mine = RendezvousStore(HOST, server.port, 5, "secret")
    mine.set("key", "value")
    other = RendezvousStore(HOST, server.port, 0.2, token)
    if token == "secret":
        assert other.get("key") == b"value"
    else:
        with pytest.raises(OSError, match=r"closed|reset|Broken"):
            other.get("key")
    assert mine.get("key") == b"value"
    server.close()


WITH_A_SILENT_NAME_SERVER = """
import socket, threading
import torch
from trainer.engine.world import World

HOST = "192.0.2.9"
queries = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
queries.bind(("127.0.0.1", 53))
queries.setblocking(False)
server = World.listen(HOST)

def join(rank):
    world = World.connect(
        rank, 2, HOST, server.port, torch.device("cpu"), 30.0,
        server if rank == 0 else None, server.token,
    )
    world.barrier()
    world.close()

threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
try:
    print("a query:", queries.recv(1000))
except BlockingIOError:
    print("no query")
threading.Thread(target=socket.gethostbyaddr, args=(HOST,), daemon=True).start()
queries.setblocking(True)
queries.settimeout(10)
assert b"in-addr" in queries.recv(1000)  # this would be noticed
"""


@pytest.mark.integration
def test_no_names_are_looked_up(tmp_path):
    """Without a name server, each look-up takes 6 s."""
    if os.geteuid() != 0 or not (shutil.which("unshare") and shutil.which("ip")):
        pytest.skip("needs root, unshare (util-linux) and ip (iproute2)")
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    prepare = (
        "ip link set lo up && ip addr add 192.0.2.9/32 dev lo && "
        f'mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec "$0" -P -c "$1"'
    )
    done = subprocess.run(
        [
            *("unshare", "--net", "--mount", "sh", "-c", prepare),
            *(sys.executable, WITH_A_SILENT_NAME_SERVER),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    if "unshare failed" in done.stdout or "Operation not permitted" in done.stdout:
        pytest.skip("namespaces are not permitted here")
    assert (done.returncode, done.stdout) == (0, "no query\n")
