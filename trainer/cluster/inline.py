"""A group of one worker: the current process, without Ray, so that debuggers and Ctrl-C work."""

import os
import socket
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from trainer.cluster.group import WorkerFailed, WorkerFunction
from trainer.config import ClusterConfig
from trainer.engine.world import World, same_bits_on_cuda
from trainer.errors import ConfigError, RunError


class InlineGroup:
    """See `WorkerGroup`. Requires `cluster.workers=1`."""

    size = 1

    def __init__(self, cfg: ClusterConfig) -> None:
        self.nodes = [socket.gethostname()]
        self.stop_requested = threading.Event()
        self._cfg = cfg
        self._world: World | None = None

    def start(self) -> None:
        """Choose the device and the number of threads."""
        has_cuda = torch.cuda.is_available()
        if self._cfg.device == "cuda" and not has_cuda:
            raise ConfigError(
                "cluster.device=cuda: torch sees no CUDA device; set cluster.device=cpu"
            )
        device = "cuda" if has_cuda and self._cfg.device != "cpu" else "cpu"
        if device == "cuda":
            same_bits_on_cuda()
        torch.set_num_threads(self._cfg.threads or os.cpu_count() or 1)
        self._world = World.single(torch.device(device))
        self._world.stop = self.stop_requested

    def run(self, function: WorkerFunction, *args: Any) -> Iterator[Any]:
        """Execute the function in this process."""
        if self._world is None:
            raise RuntimeError("start() the group before run()")
        try:
            yield from function(self._world, *args)
        except (ConfigError, RunError):
            raise
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            position = self._world.heartbeat.position
            detail = traceback.format_exc()
            raise WorkerFailed(0, self.nodes[0], reason, detail, position) from error

    def restart(self) -> None:
        """Nothing to do: this process is alive."""

    def alive(self) -> bool:
        """This process answers."""
        return True

    def stop(self) -> None:
        """Forget the world; no process was started."""
        self._world = None
