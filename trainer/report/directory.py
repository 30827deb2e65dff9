"""The run directory: everything that a run leaves on disk, written by the driver alone."""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from trainer.errors import ConfigError


class RunDirectory:
    """One run's folder. Files appear whole or not at all: each is written aside and renamed."""

    def __init__(self, path: Path, new_parents: Sequence[Path] = ()) -> None:
        self.path = path
        self._new_parents = new_parents  # that were made for it, the innermost first

    @classmethod
    def claim(cls, wanted: Path) -> "RunDirectory":
        """Create `wanted`, or where that exists `wanted-2`, `wanted-3` and so on.

        Raises:
            ConfigError: the folder cannot be made.
        """
        candidate, number = wanted.absolute(), 1
        new_parents = [parent for parent in candidate.parents if not parent.exists()]
        while True:
            try:
                candidate.mkdir(parents=True)
                return cls(candidate, new_parents)
            except FileExistsError:
                number += 1
                candidate = candidate.with_name(f"{wanted.name}-{number}")
            except OSError as error:
                raise ConfigError(
                    f"hydra.run.dir={wanted}: the run's folder cannot be made: {error}"
                ) from error

    def discard(self) -> None:
        """Remove the folder and the parents that were made for it: nothing was started."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in self._new_parents:
            try:
                parent.rmdir()
            except OSError:  # another run has moved in
                return

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml: all that is needed to run the same again."""
        self._replace("config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json."""
        self._replace("summary.json", (json.dumps(summary, indent=2) + "\n").encode())

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(entry))

    def log(self, text: str) -> None:
        """Lines of log.txt."""
        self._append("log.txt", text)

    def write_checkpoint(self, number: int, name: str, weights: bytes) -> None:
        """The weights at the end of a phase: checkpoints/01-train.safetensors and so on."""
        (self.path / "checkpoints").mkdir(exist_ok=True)
        self._replace(f"checkpoints/{number:02d}-{name}.safetensors", weights)

    def write_model(self, weights: bytes) -> None:
        """model.safetensors: the weights that the run ended with."""
        self._replace("model.safetensors", weights)

    def _append(self, name: str, line: str) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _replace(self, name: str, content: bytes) -> None:
        aside = self.path / f"{name}.part"
        aside.write_bytes(content)
        os.replace(aside, self.path / name)


def as_json(record: Any) -> dict[str, Any]:
    """A message as plain values."""
    return dataclasses.asdict(record)
