"""The checkpoints of a run directory: written in the background, whole or not at all.

checkpoints/00-initial.safetensors                 what init_from named
checkpoints/01-train.safetensors                  the plain weights that phase 1 left
checkpoints/02-prune-step-00000120.safetensors    phase 2 after 120 steps; a few are kept
"""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import RunError
from trainer.sealed import DamagedError, read_sealed, write_sealed

_INITIAL = "00-initial.safetensors"


@dataclass(frozen=True)
class Point:
    """Where a run can go on."""

    phase: int  # index of the phase that runs next, or goes on
    step: int  # of that phase; 0 is its beginning
    weights: bytes | None  # what the phase before it left, or init_from; None: there is none
    within: bytes | None  # the state of the phase at that step; None: it begins
    records: list[Mapping[str, Any]]  # of the phases that ended, as in summary.json


class Checkpoints:
    """The folder checkpoints/ of one run. Call `close` in the end."""

    def __init__(self, run: Path, keep: int) -> None:
        self.folder = run / "checkpoints"
        self._keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def keep_initial(self, weights: bytes) -> None:
        """Keep the weights to begin with, for good."""
        self._write(_INITIAL, weights, {"initial": True})
        self.wait()

    def initial(self) -> bytes | None:
        """What `keep_initial` kept; None where there is nothing, or it is damaged."""
        found = self._read(self.folder / _INITIAL, lambda line: None)
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

    def phase_ended(self, phase: int, record: Mapping[str, Any], weights: bytes) -> None:
        """Keep the weights at the end of a phase, for good."""
        self._write(_end(phase, record["name"]), weights, {"phase": phase, "record": record})

    def within_phase(self, phase: int, name: str, step: int, state: bytes | memoryview) -> None:
        """Keep the state of a phase, and let older ones go."""
        file = f"{phase + 1:02d}-{name}-step-{step:08d}.safetensors"
        self._write(file, state, {"phase": phase, "step": step})

    def wait(self) -> None:
        """Return when everything is on disk. Raises RunError where it cannot be written."""
        if self._writing is None:
            return
        try:
            self._writing.result()
        except OSError as error:
            raise RunError(f"a checkpoint cannot be written: {error}") from error
        finally:
            self._writing = None

    def close(self) -> None:
        """Let the writer end, whatever became of its work."""
        self._writer.shutdown()

    def latest(self, names: list[str], say: Callable[[str], None]) -> Point:
        """The furthest point from which the run can go on. A damaged file is said and passed over.

        What a killed driver left half-written is removed.

        Args:
            names: of the run's phases, in order.
        """
        for part in self.folder.glob("*.part"):
            part.unlink()
        weights: bytes | None = None
        records: list[Mapping[str, Any]] = []
        for phase, name in enumerate(names):
            ended = self._read(self.folder / _end(phase, name), say)
            if ended is None:
                return self._within(phase, name, weights or self.initial(), records, say)
            weights = ended[0]
            records.append(ended[1]["record"])
        return Point(len(names), 0, weights, None, records)

    def _within(
        self,
        phase: int,
        name: str,
        weights: bytes | None,
        records: list[Mapping[str, Any]],
        say: Callable[[str], None],
    ) -> Point:
        for path in sorted(self._steps(phase, name), reverse=True):
            if found := self._read(path, say):
                return Point(phase, found[1]["step"], weights, found[0], records)
        return Point(phase, 0, weights, None, records)

    def _steps(self, phase: int, name: str) -> list[Path]:
        return list(self.folder.glob(f"{phase + 1:02d}-{name}-step-*.safetensors"))

    def _read(self, path: Path, say: Callable[[str], None]) -> tuple[bytes, dict[str, Any]] | None:
        try:
            return read_sealed(path)
        except FileNotFoundError:
            return None
        except (DamagedError, OSError) as error:
            say(f"{error}; the one before it is used")
            return None

    def _write(self, name: str, content: bytes | memoryview, about: Mapping[str, Any]) -> None:
        """Write in the background, one file at a time: memory holds no more than one."""
        self.wait()
        self._writing = self._writer.submit(self._write_now, name, content, about)

    def _write_now(self, name: str, content: bytes | memoryview, about: Mapping[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        aside = self.folder / f"{name}.part"
        try:
            with aside.open("wb") as file:
                write_sealed(file, content, about)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.folder / name)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        steps = sorted(self.folder.glob("*-step-*.safetensors"))
        for old in steps[: -self._keep] if "step" in about else steps:
            old.unlink()


def _end(phase: int, name: str) -> str:
    return f"{phase + 1:02d}-{name}.safetensors"
