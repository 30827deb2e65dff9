"""The actor: one warm process that executes bodies and streams back what they yield."""

import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import ray
import torch
from torch.distributed import TCPStore

from trainer.cluster.group import Body, Failure
from trainer.engine.world import World
from trainer.errors import ConfigError


class Worker:
    """One rank. Ray calls its methods one after the other."""

    def __init__(self, rank: int, size: int, threads: int, nice: int, paths: list[str]) -> None:
        self._rank = rank
        self._size = size
        sys.path.extend(path for path in paths if path not in sys.path)
        torch.set_num_threads(threads)
        with contextlib.suppress(PermissionError):  # a cluster's own, higher niceness may stand
            os.setpriority(os.PRIO_PROCESS, 0, nice)
        self._store: TCPStore | None = None
        self._world: World | None = None

    def node(self) -> str:
        """Host name; answers once the process is up."""
        return socket.gethostname()

    def listen(self, host: str | None, timeout_s: float) -> tuple[str, int]:
        """Rank 0: open the meeting point on `host` (None: this node's address); host and port."""
        host = host or ray.util.get_node_ip_address()
        self._store = World.listen(host, timeout_s)
        return host, self._store.port

    def connect(self, host: str, port: int, device: str, timeout_s: float) -> None:
        """Join the other ranks."""
        self._world = World.connect(
            self._rank, self._size, host, port, torch.device(device), timeout_s, self._store
        )

    def run(self, body: Body, *args: Any) -> Iterator[Any]:
        """Execute the body; rank 0 passes on what it yields, every rank a failure as the last."""
        try:
            for message in body(self._world, *args):
                if self._rank == 0:
                    yield message
        except ConfigError as error:
            yield Failure(str(error), traceback.format_exc(), wrong_config=True)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            peer = isinstance(error, ConnectionError | TimeoutError)
            yield Failure(reason, traceback.format_exc(), peer=peer)
