"""Whether the result of a run meets the limits of its configuration."""

from collections.abc import Mapping
from typing import Any

from trainer.config import LimitsConfig

_ROUNDING = 1e-9  # 0.9912 - 0.9892 is a little more than 0.002


def apply_limits(summary: Mapping[str, Any], limits: LimitsConfig) -> dict[str, Any]:
    """The summary of a run that ended, with the status that the limits give it."""
    error = "; ".join(missed_limits(summary, limits)) or None
    return {**summary, "status": "limits" if error else "done", "error": error}


def missed_limits(summary: Mapping[str, Any], limits: LimitsConfig) -> list[str]:
    """A sentence for each limit that the result of a run misses.

    Args:
        summary: The content of summary.json. The decoded model file counts if there is one, and
            otherwise the final model.
        limits: The limits.
    """
    found = []
    artifact = summary.get("artifact")
    if limits.max_accuracy_drop is not None:
        accuracy = artifact["accuracy"] if artifact else summary["accuracy"]
        drop = summary["baseline_accuracy"] - accuracy
        if drop > limits.max_accuracy_drop + _ROUNDING:
            found.append(
                f"accuracy fell by {drop:.4f} from {summary['baseline_accuracy']:.4f} to "
                f"{accuracy:.4f}, limits.max_accuracy_drop={limits.max_accuracy_drop:g}"
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
