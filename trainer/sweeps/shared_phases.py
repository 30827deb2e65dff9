"""First phases that many trials have in common: trained once, and shared.

A trial that begins with the same phases, on the same model, data and seed, goes on from what they
left the first time, as a resumed run does, and so ends in the same bits as one that did it all.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

from trainer.config import Config
from trainer.errors import ConfigError

# What the weights after a phase depend on, besides the phases so far.
_PARTS = (
    "model",
    "data",
    "optimizer",
    "init_from",
    "init_skip",
    "init_strict",
    "seed",
    "precision",
    "channels_last",
    "sync_batchnorm",
    "allreduce",
)


class SharedPhases:
    """The folder prefixes/ of a sweep: ends of phases, by a digest of what they came from."""

    def __init__(self, last: str | None, folder: Path) -> None:
        """Args: last: name of the last phase to share; None: nothing is shared."""
        self.last = last
        self._folder = folder / "prefixes"

    def key(self, cfg: Config) -> str | None:
        """The digest for a trial; None where it has nothing to share."""
        if self.last not in cfg.phases:
            return None
        names = list(cfg.phases)
        shared = names[: names.index(self.last) + 1]
        origin = {part: getattr(cfg, part) for part in _PARTS}
        origin["allreduce"] = dataclasses.asdict(cfg.allreduce)
        origin["workers"] = [cfg.cluster.workers, cfg.cluster.device]
        origin["phases"] = [(name, cfg.phases[name]) for name in shared]
        text = json.dumps(origin, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def ready(self, key: str) -> bool:
        """Whether the phases have been trained."""
        return (self._folder / key).is_dir()

    def give(self, key: str, checkpoints: Path) -> None:
        """Keep the ends of phases in a trial's folder, which hold nothing else now.

        They take the place of what is there: a trial that made them itself found that damaged.
        """
        aside, kept = self._folder / f"{key}.part", self._folder / key
        shutil.rmtree(aside, ignore_errors=True)
        _link(checkpoints, aside)
        shutil.rmtree(kept, ignore_errors=True)
        os.replace(aside, kept)

    def take(self, key: str, checkpoints: Path) -> None:
        """Put them into the folder of a trial that has not begun."""
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
    """The same files in another folder; they are never written to, only replaced."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.glob("*.safetensors")):
        try:
            os.link(file, target / file.name)
        except OSError:  # a file system without hard links
            shutil.copy(file, target / file.name)
