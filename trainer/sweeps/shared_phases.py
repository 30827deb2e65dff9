"""Phases at the beginning that several trials have in common: trained once, and shared.

A trial with the same first phases, model, data and seed as an earlier one starts from the weights
after these phases, as a resumed run does, and so ends with the same bits as if it had trained them.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.errors import ConfigError

# Not part of the digest; of cluster and phases, `key` adds what the weights depend on.
_WITHOUT = (
    "name",
    "logger",
    "cluster",
    "phases",
    "checkpoint",
    "artifact",
    "export",
    "limits",
    "cost",
    "sweep",
)


class SharedPhases:
    """The folder shared_phases/ of a sweep: weights after phases, by a digest of their settings."""

    def __init__(self, last: str | None, folder: Path) -> None:
        """Args: last: name of the last phase to share; None: nothing is shared."""
        self.last = last
        self._folder = folder / "shared_phases"

    def key(self, experiment: Any) -> str | None:
        """The digest for a trial; None: it shares nothing.

        Args:
            experiment: An Experiment, whose import would slow down the start.
        """
        cfg = experiment.config
        if self.last not in cfg.phases:
            return None
        names = list(cfg.phases)
        shared = names[: names.index(self.last) + 1]
        origin = {key: value for key, value in vars(cfg).items() if key not in _WITHOUT}
        origin["workers"] = [cfg.cluster.workers, cfg.cluster.device]
        origin["phases"] = [(name, cfg.phases[name]) for name in shared]
        # Of a search, the share of the limit that it may use: it depends on later phases, too.
        phases = [experiment.phases[name] for name in shared]
        origin["max_drops"] = [phase.max_drop for phase in phases if phase.searches]
        text = json.dumps(origin, sort_keys=True, default=repr)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def ready(self, key: str) -> bool:
        """Whether the phases have been trained."""
        return (self._folder / key).is_dir()

    def save(self, key: str, checkpoints: Path) -> None:
        """Store the checkpoints of a trial, which are those of the shared phases.

        Existing ones are replaced: they were damaged, so the trial has trained the phases itself.
        """
        aside, kept = self._folder / f"{key}.part", self._folder / key
        shutil.rmtree(aside, ignore_errors=True)
        _link(checkpoints, aside)
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(aside, kept)

    def load(self, key: str, checkpoints: Path) -> None:
        """Copy the checkpoints to the folder of a trial that has not begun."""
        if self.ready(key) and not any(checkpoints.glob("*")):
            _link(self._folder / key, checkpoints)


def check_shared_phases(cfg: Config) -> None:
    """Raises ConfigError where sweep.shared_phases names no phase."""
    if cfg.sweep.shared_phases is not None and cfg.sweep.shared_phases not in cfg.phases:
        raise ConfigError(
            f"sweep.shared_phases={cfg.sweep.shared_phases}: there is no such phase; there are "
            f"{', '.join(cfg.phases)}"
        )


def _link(source: Path, target: Path) -> None:
    """Link files into another folder. This is safe, since files are replaced and never changed."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.safetensors")):
        try:
            os.link(file, target / file.name)
        except OSError:  # a file system without hard links
            shutil.copy(file, target / file.name)
