"""Data-parallel workers as Ray actors: gang-scheduled, started once, killed together."""

import os
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from trainer.cluster.group import Body, Failure, WorkerFailed
from trainer.cluster.session import RaySession
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError

ROOT_CAUSE_WAIT_S = 1.0
"""How long other workers may still report when one only says that a peer went away."""


_END = object()


class RayGroup:
    """See `WorkerGroup`."""

    def __init__(self, cfg: ClusterConfig) -> None:
        self.size = cfg.workers
        self._cfg = cfg
        self._session = RaySession(cfg)
        self._placement: PlacementGroup | None = None
        self._workers: list[Any] = []
        self.nodes: list[str] = []

    def start(self) -> None:
        """Connect to Ray, reserve room for all workers at once, start them, connect them."""
        self._session.open()
        from trainer.cluster.worker import Worker  # imports torch: not before Ray is on its way

        device = self._device()
        bundle = {"CPU": self._cfg.cpus_per_worker}
        if device == "cuda":
            bundle["GPU"] = self._cfg.gpus_per_worker
        self._placement = self._reserve(bundle)
        threads = self._cfg.threads or max(1, int(self._cfg.cpus_per_worker))
        paths = [os.getcwd(), *sys.path] if self._session.private else []
        actor = ray.remote(Worker)
        self._workers = [
            actor.options(
                num_cpus=self._cfg.cpus_per_worker,
                num_gpus=bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._placement, rank),
            ).remote(rank, self.size, threads, self._cfg.nice, paths)
            for rank in range(self.size)
        ]
        try:
            self.nodes = self._on_all("node")
            loopback = "127.0.0.1" if self._session.private else None
            host, port = ray.get(self._workers[0].listen.remote(loopback, self._cfg.hang_timeout_s))
            self._on_all("connect", host, port, device, self._cfg.hang_timeout_s)
        except RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise RunError(f"the workers did not start: {last}", str(error)) from error

    def run(self, body: Body, *args: Any) -> Iterator[Any]:
        """Stream what rank 0 yields; the first failure ends the gang."""
        if not self._workers:
            raise RuntimeError("start() the group before run()")
        streams = {
            worker.run.options(num_returns="streaming").remote(body, *args): rank
            for rank, worker in enumerate(self._workers)
        }
        while streams:
            for stream in _ready(streams):
                message = _receive(stream)
                if message is _END:
                    del streams[stream]
                elif isinstance(message, Failure):
                    late, error = self._aftermath(streams[stream], message, streams)
                    yield from late
                    raise error
                else:
                    yield message

    def stop(self) -> None:
        """Kill the actors (the only sure way out of a stuck collective), free their room.

        A private Ray takes its actors along when it ends; it may have been killed itself, and then
        would not answer.
        """
        if self._placement and not self._session.ends_ray:
            for worker in self._workers:
                ray.kill(worker)
            remove_placement_group(self._placement)
        self._workers, self._placement = [], None
        self._session.close()

    def _on_all(self, method: str, *args: Any) -> list[Any]:
        """Call a method on every worker at once and wait for all answers."""
        answers: list[Any] = ray.get([getattr(w, method).remote(*args) for w in self._workers])
        return answers

    def _device(self) -> str:
        """cpu or cuda. Raises ConfigError where CUDA is asked for and the cluster lacks it."""
        if self._cfg.device == "cpu":
            return "cpu"
        wanted = self._cfg.workers * self._cfg.gpus_per_worker
        found = ray.cluster_resources().get("GPU", 0)
        if found >= wanted:
            return "cuda"
        if self._cfg.device == "cuda":
            raise ConfigError(
                f"cluster.workers={self._cfg.workers} x cluster.gpus_per_worker="
                f"{self._cfg.gpus_per_worker:g} on cluster.device=cuda: {wanted:g} GPUs are needed "
                f"and {found:g} found; use fewer workers or cluster.device=cpu"
            )
        return "cpu"

    def _reserve(self, bundle: dict[str, float]) -> PlacementGroup:
        """Wait for one placement group that holds every worker."""
        placement: PlacementGroup = placement_group([bundle] * self.size, strategy="PACK")
        if placement.wait(self._cfg.start_timeout_s):
            return placement
        remove_placement_group(placement)
        total, free = ray.cluster_resources(), ray.available_resources()
        missing = "; ".join(
            f"{amount * self.size:g} {kind} needed, {free.get(kind, 0):g} of "
            f"{total.get(kind, 0):g} free"
            for kind, amount in bundle.items()
        )
        message = (
            f"no room for cluster.workers={self.size} within cluster.start_timeout_s="
            f"{self._cfg.start_timeout_s:g}: {missing}"
        )
        if any(amount * self.size > total.get(kind, 0) for kind, amount in bundle.items()):
            raise ConfigError(message)
        raise RunError(message)

    def _aftermath(
        self, rank: int, failure: Failure, streams: Mapping[Any, int]
    ) -> tuple[list[Any], Exception]:
        """After the first failure: what rank 0 had already said, and the error to raise.

        Where the failure only says that a peer went away, the others get a moment to say why.
        """
        late = []
        deadline = time.monotonic() + ROOT_CAUSE_WAIT_S
        waiting = {stream: r for stream, r in streams.items() if r != rank}
        while waiting:
            left = max(0, deadline - time.monotonic()) if failure.peer else 0
            ready = _ready(waiting, left)
            for stream in ready:
                message = _receive(stream)
                if message is _END:
                    del waiting[stream]
                elif not isinstance(message, Failure):
                    late.append(message)
                elif failure.peer and not message.peer:
                    rank, failure = waiting.pop(stream), message
                else:
                    del waiting[stream]
            if not ready:
                break
        if failure.wrong_config:
            return late, ConfigError(failure.reason)
        return late, WorkerFailed(rank, self.nodes[rank], failure.reason, failure.detail)


def _ready(streams: Mapping[Any, int], timeout: float | None = None) -> list[Any]:
    """The streams that have something to say, after waiting for the first of them."""
    ready, _ = ray.wait(list(streams), timeout=timeout, fetch_local=False)
    return ready


def _receive(stream: Any) -> Any:
    """The next message of a stream: a Failure where the worker died, _END at the end."""
    try:
        return ray.get(next(stream))
    except StopIteration:
        return _END
    except RayActorError as error:
        return Failure("the process died", str(error))
    except RayError as error:
        return Failure(type(error).__name__, str(error))
