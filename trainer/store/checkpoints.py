"""The checkpoints of a run directory: written in the background, whole or not at all.

checkpoints/00-initial.safetensors                 what init_from named
checkpoints/01-train.safetensors                  the plain weights that phase 1 left
checkpoints/02-prune-step-00000120.safetensors    phase 2 after 120 steps; a few are kept
checkpoints/02-prune.safetensors.damaged          it was not what had been written, and is not used
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
from trainer.store.checksummed import DamagedError, read_sealed, write_sealed
from trainer.store.files import ASIDE, write_whole

_INITIAL = "00-initial.safetensors"


@dataclass(frozen=True)
class Point:
    """Where a run can go on."""

    phase: int  # index of the phase that runs next, or goes on
    step: int  # of that phase; 0 is its beginning
    weights: bytes | None  # what the phase before it left, or init_from; None: there is none
    within: bytes | None  # the state of the phase at that step; None: it begins
    records: list[Mapping[str, Any]]  # of the phases that ended, as in summary.json
    so_far: Mapping[str, Any] = field(default_factory=dict)  # what the driver said of the run then


@dataclass(frozen=True)
class _File:
    """One checkpoint that is to be written."""

    name: str
    content: bytes | memoryview
    about: Mapping[str, Any]
    steps: re.Pattern[str] | None = None  # names of the states within the same phase
    ends: bool = True  # a phase, or nothing; False: a state within one, which a newer one replaces


class Checkpoints:
    """The folder checkpoints/ of one run. Call `close` in the end.

    Files are written one after the other, by a thread. Where the disk is slower than the run, a
    state within a phase that still waits gives way to a newer one, so that neither memory nor the
    caller is held up; the end of a phase is always written. What could not be written is raised as
    RunError by the next call.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._turn: Future[None] | None = None  # the last one that the writer was given
        self._waiting: deque[_File] = deque()
        self._lock = threading.Lock()  # of `_waiting`
        self._failure: Exception | None = None

    def keep_initial(self, weights: bytes) -> None:
        """Keep the weights to begin with, for good."""
        self._write(_File(_INITIAL, weights, {"initial": True}))
        self.wait()

    def initial(self, say: Callable[[str], None]) -> bytes | None:
        """What `keep_initial` kept; None where there is nothing, or it is damaged: that is said."""
        found = self._read(self.folder / _INITIAL, say)
        return found and found[0]

    def ended(self, names: list[str], phase: int) -> bytes:
        """The weights at the end of a phase that ended, -1 for the initial ones.

        Raises:
            RunError: they are gone, or damaged.
        """
        path = self.folder / (_INITIAL if phase < 0 else _end(phase, names[phase]))
        try:
            return read_sealed(path)[0]
        except (DamagedError, OSError) as error:
            raise RunError(f"{error}: resume the run to make it anew") from error

    def phase_ended(
        self,
        phase: int,
        record: Mapping[str, Any],
        weights: bytes,
        so_far: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the weights at the end of a phase, for good, and let the states within it go.

        Args:
            so_far: plain values about the run that `Point.so_far` gives back.
        """
        name = record["name"]
        about = {"phase": phase, "record": record, "so_far": so_far or {}}
        self._write(_File(_end(phase, name), weights, about, _steps(phase, name)))

    def within_phase(
        self,
        phase: int,
        name: str,
        step: int,
        state: bytes | memoryview,
        so_far: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the state of a phase, and let older ones of it go. Returns at once.

        Args:
            so_far: plain values about the run that `Point.so_far` gives back.
        """
        file = f"{phase + 1:02d}-{name}-step-{step:08d}.safetensors"
        about = {"phase": phase, "step": step, "so_far": so_far or {}}
        self._write(_File(file, state, about, _steps(phase, name), ends=False))

    def wait(self) -> None:
        """Return when everything is on disk. Raises RunError where it cannot be written."""
        if self._turn is not None:
            self._turn.result()
        failure, self._failure = self._failure, None
        if isinstance(failure, OSError):
            raise RunError(f"a checkpoint cannot be written: {failure}") from failure
        if failure is not None:
            raise failure

    def close(self) -> None:
        """Let the writer end, whatever became of its work."""
        self._writer.shutdown()

    def latest(self, names: list[str], say: Callable[[str], None]) -> Point:
        """The furthest point from which the run can go on.

        A damaged file is said and set aside. What lies beyond the point goes, since the run will
        make it again, and so does what a killed driver left half-written.

        Args:
            names: of the run's phases, in order.

        Raises:
            RunError: a file cannot be read, which says nothing of what is in it; all stays.
        """
        for part in self.folder.glob(f"*{ASIDE}"):
            part.unlink()
        weights: bytes | None = None
        records: list[Mapping[str, Any]] = []
        so_far: Mapping[str, Any] = {}
        for phase, name in enumerate(names):
            ended = self._read(self.folder / _end(phase, name), say)
            if ended is None:
                break
            weights, about = ended
            records.append(about["record"])
            so_far = about.get("so_far", {})
            self._remove(self._within(phase, name))
        at, step, within = len(records), 0, None
        if at < len(names):
            weights = weights or self.initial(say)
            for path in reversed(self._within(at, names[at])):
                if found := self._read(path, say):
                    within, about = found
                    step, so_far = about["step"], about.get("so_far", {})
                    break
        for phase in range(at + 1, len(names)):
            end = self.folder / _end(phase, names[phase])
            self._remove([end, *self._within(phase, names[phase])])
        return Point(at, step, weights, within, records, so_far)

    def _within(self, phase: int, name: str) -> list[Path]:
        """The states within a phase that are on disk, in the order of their steps."""
        return _matching(self.folder, _steps(phase, name)) if self.folder.is_dir() else []

    def _remove(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)

    def _read(self, path: Path, say: Callable[[str], None]) -> tuple[bytes, dict[str, Any]] | None:
        """Content and `about`; None where there is no such file, or it had to be set aside.

        Raises as `latest`.
        """
        try:
            return read_sealed(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise RunError(f"a checkpoint cannot be read: {error}") from error
        except DamagedError as error:
            os.replace(path, path.with_name(f"{path.name}.damaged"))
            say(f"{error}; set aside as {path.name}.damaged: the run goes on from before it")
            return None

    def _write(self, file: _File) -> None:
        """Let the writer do it when its turn comes."""
        if self._failure is not None:
            self.wait()
        with self._lock:
            if self._waiting and not self._waiting[-1].ends:
                self._waiting[-1] = file  # the turn of the older one is there already
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
        write_whole(path, lambda sink: write_sealed(sink, file.content, file.about), durable=True)
        if file.steps is None:
            return
        others = [other for other in _matching(self.folder, file.steps) if other != path]
        self._remove(others if file.ends else others[: max(0, len(others) + 1 - self._keep)])


def _end(phase: int, name: str) -> str:
    return f"{phase + 1:02d}-{name}.safetensors"


def _steps(phase: int, name: str) -> re.Pattern[str]:
    """What the names of the states within a phase look like; the name of no other file does."""
    return re.compile(rf"{phase + 1:02d}-{re.escape(name)}-step-\d{{8,}}\.safetensors")


def _matching(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of a folder whose whole names match, the highest number last."""
    found = (path for path in folder.iterdir() if pattern.fullmatch(path.name))
    return sorted(found, key=lambda path: (len(path.name), path.name))
