"""Ordinary training of all parameters."""

from dataclasses import dataclass
from typing import ClassVar

from trainer.config import FitConfig
from trainer.phases.base import Phase


@dataclass
class Train(Phase):
    """Train all parameters, as they are."""

    kind: ClassVar[str] = "train"

    fit: FitConfig
