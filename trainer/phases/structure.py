"""Permanent changes of a model's structure, stored beside its weights and replayed on load."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from trainer.errors import ConfigError
from trainer.phases.base import StructuralPhase

METADATA = "structure"
"""Key of the changes in the metadata of a safetensors file."""


@dataclass(frozen=True)
class StructureChange:
    """A change that a phase made: the phase's class and what it decided."""

    phase: str  # dotted path of the class
    change: dict[str, Any]  # what `StructuralPhase.plan_change` returned


def class_path(kind: type) -> str:
    """The dotted path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def to_metadata(changes: Sequence[StructureChange]) -> dict[str, str]:
    """The entry of a safetensors file's metadata that holds the changes, if there are any."""
    return {METADATA: json.dumps([asdict(change) for change in changes])} if changes else {}


def from_metadata(metadata: Mapping[str, str]) -> list[StructureChange]:
    """The changes in a safetensors file's metadata."""
    return [StructureChange(**change) for change in json.loads(metadata.get(METADATA, "[]"))]


def apply_changes(
    model: nn.Module,
    changes: Sequence[StructureChange],
    phases: Mapping[str, type[StructuralPhase]],
) -> None:
    """Make the changes on a freshly built model, in place and in order.

    Args:
        phases: The classes that may be used, by dotted path. No class is imported because a file
            names it.

    Raises:
        ConfigError: A change was made by a class that is not among `phases`.
    """
    for change in changes:
        if change.phase not in phases:
            raise ConfigError(
                f"the weights were changed in structure by {change.phase}, which is not among the "
                f"phases given: {', '.join(phases) or 'none'}; pass that class"
            )
        phases[change.phase].apply_change(model, change.change)
