"""A group of one: this very process, without Ray, so that a debugger and Ctrl-C just work."""

import os
import socket
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from trainer.cluster.group import Body, WorkerFailed
from trainer.config import ClusterConfig
from trainer.engine.world import World, same_bits_on_cuda
from trainer.errors import ConfigError, RunError


class InlineGroup:
    """See `WorkerGroup`. Takes the settings of a cluster with one worker."""

    size = 1

    def __init__(self, cfg: ClusterConfig) -> None:
        self.nodes = [socket.gethostname()]
        self.stop_asked = threading.Event()
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
        self._world.stop = self.stop_asked

    def run(self, body: Body, *args: Any) -> Iterator[Any]:
        """Iterate over the body here."""
        if self._world is None:
            raise RuntimeError("start() the group before run()")
        try:
            yield from body(self._world, *args)
        except (ConfigError, RunError):
            raise
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {error}"
            place = self._world.heartbeat.position
            raise WorkerFailed(0, self.nodes[0], reason, traceback.format_exc(), place) from error

    def restart(self) -> None:
        """This process is still there."""

    def alive(self) -> bool:
        """This process answers."""
        return True

    def stop(self) -> None:
        """Nothing was started."""
        self._world = None
