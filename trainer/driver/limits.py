"""Whether the result of a run meets the limits of its configuration."""

from collections.abc import Mapping
from typing import Any

from trainer.config import LimitsConfig
from trainer.config.drop import is_worse, worst_allowed
from trainer.metrics import MAXIMIZE, first_metric

_ROUNDING = 1e-9  # in floats, 0.9912 - 0.9892 is slightly more than 0.002


def apply_limits(summary: Mapping[str, Any], limits: LimitsConfig) -> dict[str, Any]:
    """The summary of a run that ended, with status "limits" if it misses a limit."""
    error = "; ".join(missed_limits(summary, limits)) or None
    return {**summary, "status": "limits" if error else "done", "error": error}


def missed_limits(summary: Mapping[str, Any], limits: LimitsConfig) -> list[str]:
    """A sentence for each limit that the result of a run misses.

    Args:
        summary: The content of summary.json. The limits apply to the decoded model file if there is
            one, otherwise to the final model.
        limits: The limits.
    """
    found = []
    artifact = summary.get("artifact")
    if limits.drop is not None:
        metric, direction = first_metric(summary)
        value = artifact[metric] if artifact else summary[metric]
        baseline = summary[f"baseline_{metric}"]
        worst = worst_allowed(baseline, limits.drop, direction)
        if is_worse(value, worst, direction, _ROUNDING):
            key = "max_accuracy_drop" if limits.max_drop is None else "max_drop"
            verb = "fell" if direction == MAXIMIZE else "rose"
            found.append(
                f"{metric} {verb} by {abs(value - baseline):.4f} from {baseline:.4f} to "
                f"{value:.4f}, limits.{key}={limits.drop}"
            )
    if artifact and limits.min_ratio is not None and artifact["ratio"] < limits.min_ratio:
        found.append(
            f"the file is {artifact['ratio']:.1f} times smaller than the dense model, "
            f"limits.min_ratio={limits.min_ratio:g}"
        )
    if artifact and limits.max_megabytes is not None:
        size = artifact["bytes"] / 1e6
        if size > limits.max_megabytes:
            found.append(
                f"the file has {size:.6g} MB, limits.max_megabytes={limits.max_megabytes:g}"
            )
    return found
