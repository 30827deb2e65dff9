"""A group of one worker: the current process, without Ray, so that debuggers and Ctrl-C work."""

import contextlib
import socket
import threading
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from trainer.cluster.environment import available_cpus
from trainer.cluster.group import Reformed, Step, WorkerFailed, WorkerFunction
from trainer.cluster.memory import memory_released
from trainer.config import ClusterConfig
from trainer.engine.world import World, same_bits_on_cuda
from trainer.errors import ConfigError, RunError, described


class InlineGroup:
    """See `WorkerGroup`. Requires `cluster.workers=1`. Runs in the thread that calls `run`.

    torch's global settings are changed during `run` only.
    """

    size = 1

    def __init__(self, cfg: ClusterConfig) -> None:
        self.nodes = [socket.gethostname()]
        self.notices: list[str] = []
        self.stop_requested = threading.Event()
        self.streams: dict[Any, int] = {}
        self._cfg = cfg
        self._device: torch.device | None = None

    def start(self) -> None:
        """Choose the device."""
        has_cuda = torch.cuda.is_available()
        if self._cfg.device == "cuda" and not has_cuda:
            raise ConfigError(
                "cluster.device=cuda: torch sees no CUDA device; set cluster.device=cpu"
            )
        self._device = torch.device("cuda" if has_cuda and self._cfg.device != "cpu" else "cpu")

    def run(self, function: WorkerFunction, *args: Any) -> Iterator[Any]:
        """Execute the function in this thread."""
        if self._device is None:
            raise RuntimeError("start() the group before run()")
        world = World.single(self._device)
        world.stop = self.stop_requested
        with self._torch_settings(self._device), memory_released(self._device):
            try:
                yield from function(world, *args)
            except (ConfigError, RunError):
                raise
            except (Exception, SystemExit) as error:
                reason = described(error)
                detail = traceback.format_exc()
                position = world.heartbeat.position
                raise WorkerFailed(0, self.nodes[0], reason, detail, position) from error

    def steps(self, function: WorkerFunction, *args: Any) -> Iterator[Any]:
        """All steps take long."""
        yield Step.BLOCK
        yield from self.run(function, *args)

    def restart(self) -> None:
        """Nothing to do: this process is alive."""

    def reform(self, size: int | None = None, source: int | None = None) -> Reformed:
        """Nothing to do: this process keeps no state after an error."""
        return Reformed(None, 0, [], [])

    def alive(self) -> bool:
        """This process answers."""
        return True

    def stop(self) -> None:
        """Refuse further runs; no process was started."""
        self._device = None

    @contextlib.contextmanager
    def _torch_settings(self, device: torch.device) -> Iterator[None]:
        """The number of threads and, on CUDA, algorithms and TF32; restored at the end."""
        threads = torch.get_num_threads()
        deterministic = torch.get_deterministic_debug_mode()
        fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        benchmark, tf32 = cudnn.benchmark, (cudnn.allow_tf32, matmul.allow_tf32)
        torch.set_num_threads(self._cfg.threads or available_cpus())
        if device.type == "cuda":
            same_bits_on_cuda()
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            torch.set_deterministic_debug_mode(deterministic)
            torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
            cudnn.benchmark = benchmark
            cudnn.allow_tf32, matmul.allow_tf32 = tf32
