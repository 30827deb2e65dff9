"""The checkpoints of a run directory, written in the background and atomically.

checkpoints/00-initial.safetensors                the initial weights, if they were given
checkpoints/01-train.safetensors                  the plain weights after phase 1
checkpoints/02-prune-step-00000120.safetensors    phase 2 after 120 steps; the latest few are kept
checkpoints/02-prune.safetensors.damaged          failed its checksum, and is not used
"""

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from trainer.store.checksummed import DamagedError, read_checksummed, write_checksummed
from trainer.store.files import PART, atomic_write

_INITIAL = "00-initial.safetensors"


@dataclass(frozen=True)
class ResumePoint:
    """A point from which a run can be resumed."""

    phase: int  # index of the phase that runs next, or is resumed
    step: int  # steps done of that phase; 0: it begins
    weights: bytes | None  # after the phase before it, or the initial weights; None: there are none
    checkpoint: bytes | None  # state of the phase at that step; None: it begins
    records: list[Mapping[str, Any]]  # of the phases that ended, as in summary.json
    progress: Mapping[str, Any] = field(default_factory=dict)  # stored with it by the driver


@dataclass(frozen=True)
class _File:
    """A checkpoint that is to be written."""

    name: str
    content: bytes | memoryview
    about: Mapping[str, Any]
    steps: re.Pattern[str] | None = None  # matches names of checkpoints within the same phase
    phase_end: bool = True  # False: a checkpoint within a phase, which a newer one may replace


class Checkpoints:
    """The folder checkpoints/ of one run. Call `close` at the end.

    A thread writes the files one after the other. If the disk is slower than the run, a checkpoint
    within a phase that is still waiting is replaced by a newer one, so that memory does
    not grow and the caller does not wait; the end of a phase is always written. A failure to write
    is raised as RunError by the next call.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._turn: Future[None] | None = None  # of the file that was queued last
        self._waiting: deque[_File] = deque()
        self._lock = threading.Lock()  # of `_waiting`
        self._failure: Exception | None = None

    def save_initial(self, weights: bytes) -> None:
        """Store the initial weights permanently."""
        self._write(_File(_INITIAL, weights, {"initial": True}))
        self.wait()

    def load_initial(self, notify: Callable[[str], None]) -> bytes | None:
        """The initial weights; None if there are none, or they are damaged, which is reported."""
        found = self._read(self.folder / _INITIAL, notify)
        return found and found[0]

    def weights_after(self, names: list[str], phase: int) -> bytes:
        """The weights at the end of a phase, by its index; -1 for the initial weights.

        Raises:
            RunError: They are missing or damaged.
        """
        path = self.folder / (_INITIAL if phase < 0 else _end(phase, names[phase]))
        try:
            return read_checksummed(path)[0]
        except (DamagedError, OSError) as error:
            raise RunError(f"{error}: resume the run to create it again") from error

    def save_phase_end(
        self,
        phase: int,
        record: Mapping[str, Any],
        weights: bytes,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Store the weights at the end of a phase permanently, and delete checkpoints within it.

        Args:
            progress: Plain values that `ResumePoint.progress` returns.
        """
        name = record["name"]
        about = {"phase": phase, "record": record, "progress": progress or {}}
        self._write(_File(_end(phase, name), weights, about, _steps(phase, name)))

    def save_within(
        self,
        phase: int,
        name: str,
        step: int,
        state: bytes | memoryview,
        progress: Mapping[str, Any] | None = None,
    ) -> None:
        """Store a checkpoint within a phase, and delete older ones. Returns immediately.

        Args:
            progress: Plain values that `ResumePoint.progress` returns.
        """
        file = f"{phase + 1:02d}-{name}-step-{step:08d}.safetensors"
        about = {"phase": phase, "step": step, "progress": progress or {}}
        self._write(_File(file, state, about, _steps(phase, name), phase_end=False))

    def wait(self) -> None:
        """Wait until everything is on disk. Raises RunError if it cannot be written."""
        if self._turn is not None:
            self._turn.result()
        failure, self._failure = self._failure, None
        if isinstance(failure, OSError):
            raise RunError(f"a checkpoint cannot be written: {failure}") from failure
        if failure is not None:
            raise failure

    def close(self) -> None:
        """End the writing thread, without raising its failure."""
        self._writer.shutdown()

    def latest(self, names: list[str], notify: Callable[[str], None]) -> ResumePoint:
        """The latest point from which the run can be resumed.

        A damaged file is reported and renamed. Files beyond the point are deleted, since the run
        will create them again, and so are files that a killed driver left incomplete.

        Args:
            names: Names of the run's phases, in order.
            notify: Called with one line about a damaged file.

        Raises:
            RunError: A file cannot be read, although it may be intact. Nothing is deleted.
        """
        for part in self.folder.glob(f"*{PART}"):
            part.unlink()
        weights: bytes | None = None
        records: list[Mapping[str, Any]] = []
        progress: Mapping[str, Any] = {}
        for phase, name in enumerate(names):
            ended = self._read(self.folder / _end(phase, name), notify)
            if ended is None:
                break
            weights, about = ended
            records.append(about["record"])
            progress = about.get("progress", {})
            self._remove(self._within(phase, name))
        at, step, checkpoint = len(records), 0, None
        if at < len(names):
            weights = weights or self.load_initial(notify)
            for path in reversed(self._within(at, names[at])):
                if found := self._read(path, notify):
                    checkpoint, about = found
                    step, progress = about["step"], about.get("progress", {})
                    break
        for phase in range(at + 1, len(names)):
            end = self.folder / _end(phase, names[phase])
            self._remove([end, *self._within(phase, names[phase])])
        return ResumePoint(at, step, weights, checkpoint, records, progress)

    def _within(self, phase: int, name: str) -> list[Path]:
        """The checkpoints within a phase that are on disk, in the order of their steps."""
        return _matching(self.folder, _steps(phase, name)) if self.folder.is_dir() else []

    def _remove(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def _read(
        self, path: Path, notify: Callable[[str], None]
    ) -> tuple[bytes, dict[str, Any]] | None:
        """Content and `about`; None if there is no such file, or it is damaged and was renamed.

        Raises as `latest`.
        """
        try:
            return read_checksummed(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"a checkpoint cannot be read: {error}") from error
        except DamagedError as error:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
            notify(f"{error}; renamed to {path.name}.damaged: resuming from an earlier one")
            return None

    def _write(self, file: _File) -> None:
        """Queue a file for the writing thread."""
        if self._failure is not None:
            self.wait()
        with self._lock:
            if self._waiting and not self._waiting[-1].phase_end:
                self._waiting[-1] = file  # replaces the older one in the queue
                return
            self._waiting.append(file)
        self._turn = self._writer.submit(self._write_next)

    def _write_next(self) -> None:
        with self._lock:
            file = self._waiting.popleft()
        try:
            self._write_now(file)
        except Exception as error:
            self._failure = error

    def _write_now(self, file: _File) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / file.name
        atomic_write(
            path, lambda sink: write_checksummed(sink, file.content, file.about), durable=True
        )
        if file.steps is None:
            return
        others = [other for other in _matching(self.folder, file.steps) if other != path]
        self._remove(others if file.phase_end else others[: max(0, len(others) + 1 - self._keep)])


def _end(phase: int, name: str) -> str:
    return f"{phase + 1:02d}-{name}.safetensors"


def _steps(phase: int, name: str) -> re.Pattern[str]:
    """A pattern that matches only names of checkpoints within this phase."""
    return re.compile(rf"{phase + 1:02d}-{re.escape(name)}-step-\d{{8,}}\.safetensors")


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of a folder whose names match, in the order of their numbers."""
    found = (path for path in folder.iterdir() if pattern.fullmatch(path.name))
    return sorted(found, key=lambda path: (len(path.name), path.name))
