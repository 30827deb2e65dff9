"""The members of an elastic run: the state from which the next group continues, and replays."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cluster import Reformed, WorkerGroup
from trainer.config import ClusterConfig
from trainer.errors import ConfigError
from trainer.messages import STEP_COMPLETE, MembersChanged
from trainer.report.text import plural
from trainer.store.checkpoints import ResumePoint

Position = tuple[int, int, int]
"""Phase, step and stage, as in `trainer.messages.Handover`."""


class Members:
    """Follows the groups of workers that execute one run, one after the other."""

    def __init__(self, cfg: ClusterConfig) -> None:
        """Raises ConfigError if `cluster.replay` is not the members.jsonl of a run."""
        self.is_recorded = cfg.is_elastic
        self._plan = [] if cfg.replay is None else read_plan(Path(cfg.replay), cfg.workers)
        self._kept: Position | None = None  # of the state that rank 0 of the group keeps
        self._source = 0
        self._reason = "start"
        self._since = time.monotonic()

    @property
    def is_replay(self) -> bool:
        """Whether the changes of another run are repeated."""
        return bool(self._plan)

    def continues_at(self, point: ResumePoint) -> Position | None:
        """The position of the state that the workers keep, unless the checkpoint is later.

        A state of another phase is not used: either the end of that phase is stored, or the phase
        has to be trained again.
        """
        kept = self._kept
        stored = (point.phase, point.step, STEP_COMPLETE) if point.step else (point.phase, 0, 0)
        if kept is not None and kept[0] == point.phase and kept >= stored:
            return kept
        self._kept, self._source = None, 0
        return None

    def leave_at(self, position: Position) -> Position | None:
        """Where the group that starts at `position` ends, if a run is repeated."""
        later = (entry_position(entry) for entry in self._plan)
        return next((at for at in later if at > position), None)

    def begin(self, group: WorkerGroup, position: Position) -> None:
        """Bring the group of a repeated run to the size that it has at `position`."""
        self._since = time.monotonic()
        passed = [entry for entry in self._plan if entry_position(entry) <= position]
        if passed:
            entry = passed[-1]
            self._take(group.reform(entry["workers"], entry["source"]))
            self._reason = entry["reason"]

    def change(self, group: WorkerGroup, reason: str | None = None) -> None:
        """Let the group take in and release members.

        Args:
            group: An elastic group whose last function failed or stopped.
            reason: The reason; None: a planned change, described by who joins and leaves.
        """
        self._since = time.monotonic()
        before = group.size
        reformed = group.reform()
        self._take(reformed)
        parts = [reason] if reason else [f"{name} left" for name in reformed.left]
        if reformed.joined:
            count = len(reformed.joined)
            names = ", ".join(reformed.joined)
            parts.append(f"{count} {plural('worker', count)} joined on {names}")
        self._reason = "; ".join(parts) or f"{before} workers connected again"

    def started(self, group: WorkerGroup, position: Position) -> MembersChanged:
        """The group is ready to train from `position` on."""
        phase, step, stage = position
        return MembersChanged(
            phase=phase,
            step=step,
            stage=stage,
            workers=group.size,
            nodes=group.nodes,
            source=self._source,
            reason=self._reason,
            seconds=round(time.monotonic() - self._since, 3),
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        )

    def _take(self, reformed: Reformed) -> None:
        self._kept, self._source = reformed.kept, reformed.source


def entry_position(entry: Mapping[str, Any]) -> Position:
    """The position of a line of members.jsonl."""
    return entry["phase"], entry["step"], entry["stage"]


def read_plan(path: Path, workers: int) -> list[dict[str, Any]]:
    """The lines of a members.jsonl; of several at the same position, only the last one.

    Args:
        path: The file.
        workers: The largest number of workers that a line may have.

    Raises:
        ConfigError: The file is not a members.jsonl, or has more workers.
    """
    plan: dict[Position, dict[str, Any]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            entry = json.loads(line)
            numbers = [entry[key] for key in ("phase", "step", "stage", "workers", "source")]
            if not all(type(number) is int for number in numbers) or entry["workers"] < 1:
                raise ValueError(f"{line} has a value that is not a valid number")
            entry.setdefault("reason", "")
            plan[entry_position(entry)] = entry
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"cluster.replay={path}: it must be the members.jsonl of an elastic run: {error}"
        ) from error
    if not plan:
        raise ConfigError(f"cluster.replay={path}: the file is empty")
    largest = max(entry["workers"] for entry in plan.values())
    if largest > workers:
        raise ConfigError(
            f"cluster.replay={path}: it has up to {largest} workers; set cluster.workers={largest}"
        )
    return [plan[position] for position in sorted(plan)]
