"""Measures of a trial: objectives, constraints, and the value that pruners compare."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.config import SweepConfig
from trainer.errors import ConfigError
from trainer.sweeps.compare import Comparison, excess, parse_bound

Record = Mapping[str, Any]
"""An entry of `phases` in summary.json."""

MEASURES: dict[str, Callable[[Sequence[Record]], float | None]] = {
    "accuracy": lambda records: records[-1]["accuracy"],  # validation, fraction
    "loss": lambda records: records[-1]["loss"],  # validation, nats
    "parameters": lambda records: records[-1]["parameters"],  # of the dense model
    "nonzero": lambda records: records[-1]["nonzero"],  # of the parameters
    "macs": lambda records: records[-1]["macs"],  # per sample, of weights that are not zero
    "bytes": lambda records: records[-1].get("bytes"),  # of model.dcz; None: not encoded
    "seconds": lambda records: sum(record["seconds"] for record in records),
}
"""From the records of a trial's phases to one number; a new measure needs a line here."""

SIZES = ("parameters", "nonzero", "macs", "bytes")  # grow with the number of nonzero weights


def measure(records: Sequence[Record]) -> dict[str, float]:
    """All measures of a trial that ended."""
    found = {name: of(records) for name, of in MEASURES.items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def needs_artifact(cfg: SweepConfig) -> bool:
    """Whether the objectives or constraints need the size of the compressed file."""
    return "bytes" in cfg.objectives or "bytes" in cfg.constraints


def check_measures(cfg: SweepConfig) -> None:
    """Refuse objectives and constraints that are no measures. Raises ConfigError."""
    parse_constraints(cfg)
    for section in ("objectives", "constraints"):
        for name in getattr(cfg, section):
            if name not in MEASURES:
                raise ConfigError(
                    f"sweep.{section}.{name}: unknown; there are {', '.join(MEASURES)}"
                )


def parse_constraints(cfg: SweepConfig) -> dict[str, Comparison]:
    """The bounds by measure. Raises ConfigError."""
    return {
        name: parse_bound(f"sweep.constraints.{name}", text)
        for name, text in cfg.constraints.items()
    }


def violations(bounds: Mapping[str, Comparison], measured: Mapping[str, float]) -> dict[str, float]:
    """By how much each bound is violated; 0 or less: it is not."""
    return {name: excess(bound, measured[name]) for name, bound in bounds.items()}


def not_finite(cfg: SweepConfig, measured: Mapping[str, float]) -> str | None:
    """The measure that is NaN or infinite, as a sentence; None: all are finite."""
    for name in dict.fromkeys(("loss", "accuracy", *cfg.objectives, *cfg.constraints)):
        if not math.isfinite(measured[name]):
            return f"the {name} after the last phase is {measured[name]}"
    return None


def better(cfg: SweepConfig) -> str:
    """Which way `sweep.metric` improves: maximize or minimize."""
    natural = "maximize" if cfg.metric == "accuracy" else "minimize"
    return str(cfg.objectives.get(cfg.metric, natural))


def watched(cfg: SweepConfig, value: float, weights_left: float) -> float:
    """The one number that the pruner compares.

    With several objectives the metric alone would stop every small network. So, if a size is
    minimized, ten times fewer weights count as much as `sweep.size_weight` in the metric.

    Args:
        value: `sweep.metric` on the validation data.
        weights_left: number of parameters that are not zero.
    """
    sizes = [name for name, d in cfg.objectives.items() if name in SIZES and d == "minimize"]
    if len(cfg.objectives) == 1 or not sizes or not cfg.size_weight:
        return value
    price = cfg.size_weight * math.log10(max(weights_left, 1.0))
    return value - price if better(cfg) == "maximize" else value + price
