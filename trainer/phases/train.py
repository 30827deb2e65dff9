"""Ordinary training of all parameters."""

from dataclasses import dataclass, field
from typing import ClassVar

from trainer.config import FitConfig
from trainer.phases.base import Phase


@dataclass
class Train(Phase):
    """Train all parameters as they are."""

    kind: ClassVar[str] = "train"

    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=1), kw_only=True)
