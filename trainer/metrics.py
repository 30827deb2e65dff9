"""Names, directions and text of metrics, for all that only reads them.

Without torch, so that the command answers at once. `trainer.tasks.metrics` computes metrics.
"""

from collections.abc import Mapping
from typing import Any

MAXIMIZE, MINIMIZE = "maximize", "minimize"

LOSS = "loss"
"""The first metric of a task without metrics."""


def format_metric(name: str, value: float | None) -> str:
    """A metric as it is usually written: accuracies in percent, others with four digits."""
    if value is None:
        return "unknown"
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


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
    """Names of the metrics other than the loss."""
    return [name for name in directions(summary) if name != LOSS]
