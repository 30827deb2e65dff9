"""One worker as the driver sees it."""

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.config import ClusterConfig


@dataclass
class Rank:
    """The driver's data about one worker."""

    actor: Any
    node: str = ""  # host name
    node_id: str = ""  # Ray's id of the host
    pid: int = 0
    started: float = 0.0  # when the process started, in seconds since 1970

    def kill(self) -> None:
        """End the worker even if its process is suspended and cannot handle requests."""
        ray.kill(self.actor)
        if not self.pid:  # it never started
            return
        if self.node_id == ray.get_runtime_context().get_node_id():
            kill_process(self.pid, self.started)
            return
        on_its_node = NodeAffinitySchedulingStrategy(self.node_id, soft=False)
        task = ray.remote(num_cpus=0)(kill_process)
        task.options(scheduling_strategy=on_its_node).remote(self.pid, self.started)


def request_worker(
    cfg: ClusterConfig,
    bundle: Mapping[str, float],
    strategy: Any,
    selector: dict[str, str] | None,
    is_local: bool,
) -> Any:
    """Request a worker from Ray. Returns its actor, which answers `identity` once it is up.

    Args:
        cfg: the settings of its group.
        bundle: the resources that it needs.
        strategy: Ray's scheduling strategy.
        selector: Ray's label selector of the hosts to use; None: the strategy determines them.
        is_local: whether it runs on this machine, and may import what this process can import.
    """
    from trainer.cluster.worker import CONTROL, Worker  # imports torch, after Ray has started

    threads = cfg.threads or max(1, int(cfg.cpus_per_worker))
    paths = [os.getcwd(), *sys.path] if is_local else []
    return (
        ray.remote(concurrency_groups={CONTROL: 1})(Worker)  # type: ignore[call-overload]
        .options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=strategy,
            label_selector=selector,
        )
        .remote(threads, cfg.nice, paths)
    )


def kill_process(pid: int, started: float) -> None:
    """End a process of this host at once, unless it has ended and its id was given to another.

    Args:
        pid: its id.
        started: when it started, in seconds since 1970.
    """
    with contextlib.suppress(psutil.Error):  # it has ended
        process = psutil.Process(pid)
        if abs(process.create_time() - started) < 1:
            process.kill()
