"""Which evaluation of a training is the best, and when it is over because none is better."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from trainer.compress.state import load_state, model_state
from trainer.config import FitConfig
from trainer.engine.evaluate import Metrics
from trainer.metrics import MAXIMIZE, format_metric


@dataclass
class Selection:
    """The best evaluation so far, by the first metric of the task.

    Metrics are the same on all ranks, and so are the decisions. NaN is no improvement.

    Args:
        fit: Settings of the training: `patience`, `min_delta`, `keep_best`.
    """

    fit: FitConfig
    best: float = math.nan  # value of the best evaluation
    epoch: int = -1  # whose end it was; 0 is the first, -1: none yet
    weights: dict[str, Tensor] = field(default_factory=dict)  # with `keep_best`: its weights
    last_gain: float = math.nan  # value of the last evaluation better by more than `min_delta`
    last_gain_epoch: int = -1
    evaluated: int = -1  # the last epoch that was added

    def add(self, epoch: int, metrics: Metrics, model: nn.Module) -> bool:
        """Compare the evaluation at the end of an epoch. Adding it again changes nothing.

        Args:
            epoch: Of the phase or round; 0 is the first.
            metrics: Of the model.
            model: As it was evaluated.

        Returns:
            Whether the training is over.
        """
        value, self.evaluated = metrics.first, epoch
        sign = 1 if metrics.direction == MAXIMIZE else -1
        if _gains(value, self.best, sign):
            self.best, self.epoch = value, epoch
            if self.fit.keep_best:
                self.weights = {name: t.clone() for name, t in model_state(model).items()}
        if _gains(value, self.last_gain, sign, self.fit.min_delta):
            self.last_gain, self.last_gain_epoch = value, epoch
        return self.fit.patience is not None and epoch - self.last_gain_epoch >= self.fit.patience

    def restore(self, model: nn.Module) -> None:
        """Give the model the weights of the best evaluation, if they were kept."""
        if self.weights:
            load_state(model, self.weights)

    def notice(self, last_epoch: int, early: bool, metric: str) -> str:
        """What to tell the user when the training is over; empty if there is nothing to say.

        Args:
            last_epoch: That was trained.
            early: Whether the training ended because `add` returned true.
            metric: Name of the first metric.
        """
        parts = []
        if early:
            since = f"has not improved since epoch {self.last_gain_epoch + 1}"
            if self.last_gain_epoch < 0:
                since = "was NaN in every epoch"
            parts.append(
                f"stopped after epoch {last_epoch + 1} of {self.fit.epochs}: {metric} {since}"
            )
        if self.weights and self.epoch < last_epoch:
            best = format_metric(metric, self.best)
            parts.append(f"continues with the weights of epoch {self.epoch + 1} ({metric} {best})")
        return "; ".join(parts)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs."""
        return {key: value for key, value in vars(self).items() if key != "fit"}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned."""
        vars(self).update(state)


def _gains(value: float, reference: float, sign: int, delta: float = 0.0) -> bool:
    """Whether a value is better than a reference; a number is better than NaN."""
    return not math.isnan(value) and (math.isnan(reference) or sign * (value - reference) > delta)
