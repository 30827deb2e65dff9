"""The metrics of a run, as summary.json describes its task."""

from collections.abc import Mapping
from typing import Any

from trainer.tasks.base import LOSS
from trainer.tasks.metrics import MAXIMIZE


def directions(summary: Mapping[str, Any]) -> dict[str, str]:
    """Whether larger ("maximize") or smaller values are better, by metric, the first one first.

    Args:
        summary: The content of summary.json.
    """
    task = summary.get("task") or {"metrics": {"accuracy": MAXIMIZE}}
    return dict(task["metrics"])


def first_metric(summary: Mapping[str, Any]) -> tuple[str, str]:
    """Name and direction of the metric that limits and reports use."""
    return next(iter(directions(summary).items()))


def metric_names(summary: Mapping[str, Any]) -> list[str]:
    """Names of the metrics besides the loss."""
    return [name for name in directions(summary) if name != LOSS]
