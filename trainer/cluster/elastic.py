"""A group of Ray actors whose members may change during a run (`cluster.min_workers`)."""

import contextlib
import dataclasses
import time
from typing import Any

from ray.exceptions import RayError

from trainer.cluster.group import Failure, InsufficientResources, Reformed
from trainer.cluster.members import Answer, choose, to_drop
from trainer.cluster.nodes import NodeMonitor
from trainer.cluster.placement import Placement
from trainer.cluster.rank import Rank
from trainer.cluster.ray_group import RayGroup
from trainer.cluster.recruits import Recruits
from trainer.config import ClusterConfig
from trainer.errors import ConfigError

SETTLE_S = 5.0  # at the start: how long to wait for another worker beyond `min_workers`
CONNECT_WAIT_S = 10.0  # how long the members may take to connect with one another
POLL_S = 0.05  # between two checks whether enough workers are ready


class ElasticGroup(RayGroup):
    """See `WorkerGroup`. It has between `cluster.min_workers` and `cluster.workers` members.

    While there are fewer than `cluster.workers`, others are requested from Ray. When one is ready,
    or the host of a member gets notice to leave, the run is asked to stop at its next step with
    RunStopped(changes_members=True), and the caller calls `reform`.
    """

    root_cause_wait_s = 0.3

    def __init__(self, cfg: ClusterConfig) -> None:
        super().__init__(cfg)
        assert cfg.min_workers is not None
        self._minimum = cfg.min_workers
        self.busy_wait_s = cfg.hang_timeout_s  # it may still be storing its state
        # The device, and the message about missing resources, are those of the smallest group.
        self._placement = Placement(dataclasses.replace(cfg, workers=self._minimum))
        self._recruits = Recruits(lambda: self._new_actor(None))
        self._nodes: NodeMonitor | None = None
        self._changed_run = 0  # the last run that was requested to change its members
        self._noticed: set[str] = set()  # hosts whose notice has been handled

    def start(self) -> None:
        """Connect to Ray, and start as many workers as there are resources for."""
        self._connection.open()
        self._check_stop()
        self._nodes = NodeMonitor()
        self._placement.choose_device()
        self._reform([], keep=False, settle_s=SETTLE_S)
        if self._placement.device == "cuda" and self._ranks_without_gpu():
            raise ConfigError(
                "cluster.device=cuda: torch sees no GPU on some worker's node; use "
                "cluster.device=cpu, or a build of PyTorch for CUDA"
            )

    def restart(self) -> None:
        """Make the group usable without any state of the previous run."""
        self._reform(self._answers(), keep=False)

    def reform(self, size: int | None = None, source: int | None = None) -> Reformed:
        """See `WorkerGroup`. It takes no arguments: recorded runs are repeated by `RayGroup`."""
        self._connection.check_head()
        return self._reform(self._answers(), keep=True)

    def stop(self) -> None:
        """See `RayGroup`."""
        if self._nodes is not None:
            self._nodes.stop()
        super().stop()
        self._recruits = Recruits(lambda: self._new_actor(None))

    def _actors(self) -> list[Any]:
        return [*super()._actors(), *self._recruits.actors()]

    def _attend(self) -> None:
        """Look for new workers and for hosts with notice; if there are any, request a change."""
        if self._connection.head.lost or self._changed_run == self._runs:
            return
        self._avoid_silent_hosts()
        ready = self._recruits.poll(self._cfg.workers - self.size)
        notice = {rank.node_id for rank in self._ranks if self._has_notice(rank)} - self._noticed
        if ready or notice:
            self._changed_run = self._runs
            with contextlib.suppress(RayError):  # it is lost: its stream reports that
                self._ranks[0].actor.request_change.remote(self._runs)

    def _on_silence(self, rank: Rank) -> None:
        """Start no worker on a host until it answers: Ray may notice only later that it is lost."""
        if self._nodes is not None:
            self._nodes.add_silent({rank.node_id: rank.node})

    def _avoid_silent_hosts(self) -> None:
        """Keep new workers off the hosts that do not answer now."""
        if self._nodes is not None and self._placement.lost != self._nodes.silent:
            self._placement.lost = self._nodes.silent
            self._recruits.discard(self._placement.lost)

    def _has_notice(self, rank: Rank) -> bool:
        return self._nodes is not None and rank.node_id in self._nodes.draining

    def _has_left(self, rank: int, reported: Failure | None) -> bool:
        if reported is None:
            # Ray on a host that runs reports the end of a process at once. That the host itself is
            # lost, Ray notices only after 20 to 65 s.
            self._on_silence(self._ranks[rank])
            return True
        return super()._has_left(rank, reported)

    def _answers(self) -> list[Answer]:
        """Ask all members which state they keep; those that do not answer are ended."""
        kept = self._end_lost("kept")
        return [Answer(n, state, self._has_notice(self._ranks[n])) for n, state in kept.items()]

    def _reform(self, answers: list[Answer], *, keep: bool, settle_s: float = 0.0) -> Reformed:
        """Connect all available workers in a new group.

        Args:
            answers: of the members of the previous group.
            keep: whether to continue from a state that they keep.
            settle_s: how long to wait for further workers when there are enough, in seconds.
        """
        before = self._ranks
        joined: list[Rank] = []
        while True:
            present = sum(not answer.leaves for answer in answers)
            joined += self._gather(present + len(joined), len(answers) + len(joined), settle_s)
            members = choose(answers, len(joined), self._minimum)
            self._ranks = [*(before[answer.rank] for answer in members), *joined]
            lost = self._connect_or_drop(keep)
            if not lost:
                break
            for rank in lost:
                rank.kill()
            answers = [answer for answer in answers if before[answer.rank] not in lost]
            joined = [rank for rank in joined if rank not in lost]
        left = []
        for number, rank in enumerate(before):
            if rank not in self._ranks:
                rank.kill()
                left.append(f"worker {number} on {rank.node}")
        self._noticed = {rank.node_id for rank in self._ranks if self._has_notice(rank)}
        new = [rank.node for rank in joined]
        if not keep or not members or members[0].kept is None:
            return Reformed(None, 0, left, new)
        return Reformed(members[0].kept, members[0].rank, left, new)

    def _gather(self, present: int, available: int, settle_s: float) -> list[Rank]:
        """Add new workers; wait for them while there are too few.

        Args:
            present: number of workers that stay.
            available: the same, including those whose host has been given notice.
            settle_s: as for `_reform`.
        """
        deadline = time.monotonic() + self._cfg.start_timeout_s
        wanted = self._cfg.workers - present
        last, since = -1, time.monotonic()
        while True:
            self._avoid_silent_hosts()
            ready = self._recruits.poll(wanted)
            now = time.monotonic()
            if ready != last:
                last, since = ready, now
            enough = available + ready >= self._minimum
            if ready >= wanted or (enough and now - since >= settle_s):
                return self._recruits.take(wanted)
            if now > deadline:
                if enough:
                    return self._recruits.take(wanted)
                message, permanent = self._placement.shortage()
                message = message.replace("cluster.workers=", "cluster.min_workers=")
                raise (
                    ConfigError(message)
                    if permanent and not self._ranks
                    else (InsufficientResources(message))
                )
            self._check_stop()
            time.sleep(POLL_S)

    def _connect_or_drop(self, keep: bool) -> list[Rank]:
        """Connect `_ranks`. Returns those to leave out at the next attempt; empty: it succeeded."""
        lost, failures = self._try_connect(CONNECT_WAIT_S, keep)
        if not lost and failures and (links := self._broken_links(failures)):
            avoided = self._placement.avoided()
            self._recruits.discard(avoided)
            lost = [number for number, rank in enumerate(self._ranks) if rank.node_id in avoided]
            names = " and ".join({self._ranks[number].node for number in lost})
            self._moves.append(f"{'; '.join(links)}: no worker starts on {names} any more")
        if not lost and failures:
            blamed = [failure.lost_rank for failure in failures.values()]
            lost = [to_drop(list(failures), blamed)]
        return [self._ranks[number] for number in lost]
