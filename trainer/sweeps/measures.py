"""Measures of a trial: objectives, constraints, and the value that pruners compare."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trainer.config import Config, SweepConfig
from trainer.errors import ConfigError
from trainer.messages import TRIAL_MEASURES, PhaseRecord
from trainer.sweeps.compare import Comparison, excess, parse_bound

Record = Mapping[str, Any]
"""An entry of `phases` in summary.json."""

MEASURES: dict[str, Callable[[Sequence[Record]], float | None]] = {
    "accuracy": lambda records: records[-1].get("accuracy"),  # validation, fraction
    "loss": lambda records: records[-1]["loss"],  # validation
    "parameters": lambda records: records[-1]["parameters"],  # of the dense model
    "nonzero": lambda records: records[-1]["nonzero"],  # of the parameters
    "macs": lambda records: records[-1]["macs"],  # per sample, of weights that are not zero
    "bytes": lambda records: records[-1].get("bytes"),  # of model.dcz; None: not encoded
    # CPU microseconds of a sample on one thread, by the engine; None: not measured
    "latency": lambda records: records[-1].get("latency"),
    # Of a sample, by the models of trainer.hardware; None: not computed
    "energy": lambda records: records[-1].get("energy"),  # microjoules
    "tpu_cycles": lambda records: records[-1].get("tpu_cycles"),
    "eie_cycles": lambda records: records[-1].get("eie_cycles"),
    "seconds": lambda records: sum(record["seconds"] for record in records),
}
"""Each measure as a function of the records of a trial's phases.

The other metrics of the task are measures as well, on validation data after the last phase.
"""

_NO_METRICS = {field.name for field in dataclasses.fields(PhaseRecord)} | {*TRIAL_MEASURES}


def task_directions(cfg: Config, objects: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of the task by name: maximize or minimize. The first one comes first.

    Raises:
        ConfigError: The settings of the task are wrong.
    """
    plain = cfg.task.get("metrics") in (None, ["accuracy"])
    if plain and cfg.task.get("_target_") == "trainer.tasks.Classification":
        return {"accuracy": "maximize"}
    from trainer.config.instantiate import Factory
    from trainer.tasks import Task  # imports torch, which slows down the start

    task: Factory[Task] = Factory("task", cfg.task, Task, objects)
    return task.build().directions


def for_task(cfg: Config, directions: Mapping[str, str]) -> Config:
    """The settings of a sweep with `accuracy` replaced by the first metric of a task without it."""
    if "accuracy" in directions:
        return cfg
    first = next(iter(directions))
    sweep = cfg.sweep
    objectives = {
        (first if name == "accuracy" else name): (
            directions[first] if name == "accuracy" else direction
        )
        for name, direction in sweep.objectives.items()
    }
    metric = first if sweep.metric == "accuracy" else sweep.metric
    changed = dataclasses.replace(sweep, objectives=objectives, metric=metric)
    return dataclasses.replace(cfg, sweep=changed)


SIZES = ("parameters", "nonzero", "macs", "bytes")  # grow with the number of nonzero weights


def measure(records: Sequence[Record]) -> dict[str, float]:
    """All measures of a trial that ended."""
    last = records[-1]
    found = {name: of(records) for name, of in MEASURES.items()}
    found |= {name: value for name, value in last.items() if name not in _NO_METRICS}
    return {name: float(value) for name, value in found.items() if value is not None}


def requested(cfg: SweepConfig) -> list[str]:
    """The measures of workers that the objectives or constraints need: they take time."""
    return [name for name in TRIAL_MEASURES if name in cfg.objectives or name in cfg.constraints]


def check_measures(cfg: SweepConfig, directions: Mapping[str, str]) -> None:
    """Refuse objectives, constraints and a metric that are not measured. Raises ConfigError.

    Args:
        directions: Of the metrics of the task, by name.
    """
    parse_constraints(cfg)
    known = dict.fromkeys([*directions, *(name for name in MEASURES if name != "accuracy")])
    if cfg.metric != "loss" and cfg.metric not in directions:
        raise ConfigError(
            f"sweep.metric={cfg.metric}: it must be one of {', '.join([*directions, 'loss'])}"
        )
    if cfg.metric not in ("accuracy", "loss", *cfg.objectives):
        raise ConfigError(
            f"sweep.metric={cfg.metric}: state its direction in sweep.objectives, such as "
            f"sweep.objectives.{cfg.metric}={directions[cfg.metric]}"
        )
    for section in ("objectives", "constraints"):
        for name in getattr(cfg, section):
            if name not in known:
                raise ConfigError(f"sweep.{section}.{name}: unknown; there are {', '.join(known)}")


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
    """A sentence about an objective, constraint or metric that is not finite; None: all are."""
    for name in dict.fromkeys(("loss", cfg.metric, *cfg.objectives, *cfg.constraints)):
        if not math.isfinite(measured[name]):
            return f"the {name} after the last phase is {measured[name]}"
    return None


def better(cfg: SweepConfig) -> str:
    """The direction of `sweep.metric`: maximize or minimize."""
    natural = "maximize" if cfg.metric == "accuracy" else "minimize"
    return str(cfg.objectives.get(cfg.metric, natural))


def watched(cfg: SweepConfig, value: float, weights_left: float) -> float:
    """The number that the pruner compares.

    With several objectives, a pruner that compares the metric alone would stop every small
    network. So, if a size is minimized, `sweep.size_weight` is added to the metric for every factor
    of ten by which there are fewer weights.

    Args:
        value: `sweep.metric` on the validation data.
        weights_left: number of parameters that are not zero.
    """
    sizes = [name for name, d in cfg.objectives.items() if name in SIZES and d == "minimize"]
    if len(cfg.objectives) == 1 or not sizes or not cfg.size_weight:
        return value
    price = cfg.size_weight * math.log10(max(weights_left, 1.0))
    return value - price if better(cfg) == "maximize" else value + price
