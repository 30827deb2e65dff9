"""Tasks whose targets are numbers: regression, and several yes-or-no labels at once."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.errors import ConfigError
from trainer.tasks.base import Task, first_wrong
from trainer.tasks.metrics import R2, Error, LabelAccuracy, LabelF1, Metric

_LOSSES = ("mse", "mae", "huber")


@dataclass
class Regression(Task):
    """Numbers: predictions [samples, ...] with targets of the same shape.

    A prediction [samples, 1] is compared with targets [samples], and the other way round. Losses
    are means over all numbers.

    Args:
        loss: "mse" (squared error), "mae" (absolute error) or "huber" (half the squared error up to
            `delta`, then linear; Huber, Robust Estimation of a Location Parameter, 1964); or a
            function or module, called with predictions and targets of the same shape.
        delta: Error at which loss=huber becomes linear, in units of the targets.
    """

    kind: ClassVar[str] = "regression"
    built_in: ClassVar[Mapping[str, Callable[[], Metric]]] = {
        "mae": lambda: Error(1),
        "mse": lambda: Error(2),
        "rmse": lambda: Error(2, root=True),
        "r2": R2,
    }
    default_metrics: ClassVar[tuple[str, ...]] = ("mae", "rmse", "r2")

    loss: Any = "mse"
    _: KW_ONLY
    delta: float = 1.0

    def check_settings(self) -> None:
        if not self.has_own_loss and self.loss not in _LOSSES:
            raise ConfigError(
                f"loss={self.loss}: it must be one of {', '.join(_LOSSES)}, or a mapping with the "
                "_target_ of a loss"
            )
        if not 0 < self.delta < float("inf"):
            raise ConfigError(f"delta={self.delta}: it must be above 0")

    def units(self, targets: Tensor) -> float:
        """Number of numbers."""
        return targets.numel()

    def full_units(self, targets: Tensor) -> int:
        return targets.numel()

    def mean_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        if self.has_own_loss:
            return super().mean_loss(prediction, targets, units)
        return self._loss(*self.loss_inputs(prediction, targets), "mean" if units else "sum")

    def sum_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        if self.has_own_loss:
            return super().sum_loss(prediction, targets, units)
        return self._loss(*self.loss_inputs(prediction, targets), "sum")

    def divergence(
        self, student: Tensor, teacher: Tensor, targets: Tensor, units: float, temperature: float
    ) -> Tensor:
        """The task's own loss, with the prediction of the dense model as the target.

        The temperature has no meaning for numbers.
        """
        return self.mean_loss(student, teacher.view_as(student), units)

    def loss_inputs(self, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and targets of the same shape, as floats."""
        if prediction.dtype in (torch.float16, torch.bfloat16):
            prediction = prediction.float()  # a squared error needs the range
        return prediction.view_as(targets), targets.to(prediction.dtype)

    def check(self, prediction: Tensor, targets: Tensor) -> str | None:
        if _squeezed(prediction.shape) == _squeezed(targets.shape):
            return None
        return "it must be a tensor of the same shape"

    def check_values(self, targets: Tensor, shape: Sequence[int]) -> tuple[int, str] | None:
        if not targets.is_floating_point() or bool(targets.isfinite().all()):
            return None
        return first_wrong(
            ~targets.isfinite()
        ), "its target is NaN or infinite; correct or remove it"

    def _loss(self, prediction: Tensor, targets: Tensor, reduction: str) -> Tensor:
        if self.loss == "mse":
            return F.mse_loss(prediction, targets, reduction=reduction)
        if self.loss == "mae":
            return F.l1_loss(prediction, targets, reduction=reduction)
        return F.huber_loss(prediction, targets, reduction=reduction, delta=self.delta)


@dataclass
class MultiLabel(Task):
    """Several labels at once, each of which is present or not: binary cross-entropy.

    Predictions are logits [samples, labels], targets of the same shape 0 or 1, or probabilities in
    between. Losses are means over all labels of all samples. The first metric is the F1 score over
    all labels.

    Args:
        positive_weights: A weight for each label, of the loss where it is present, such as the
            number of samples without it divided by that of samples with it; None: 1.
        label_smoothing: Targets become (1 - label_smoothing) target + label_smoothing / 2.
    """

    kind: ClassVar[str] = "multilabel"
    built_in: ClassVar[Mapping[str, Callable[[], Metric]]] = {
        "f1": LabelF1,
        "macro_f1": lambda: LabelF1("macro"),
        "label_accuracy": LabelAccuracy,
        "exact_accuracy": lambda: LabelAccuracy(exact=True),
    }
    default_metrics: ClassVar[tuple[str, ...]] = ("f1", "label_accuracy")

    _: KW_ONLY
    positive_weights: Any = None
    label_smoothing: float = 0.0

    def check_settings(self) -> None:
        if self.loss is not None and not self.has_own_loss:
            raise ConfigError(
                f"loss={self.loss}: it must be null (binary cross-entropy), or a mapping with the "
                "_target_ of a loss"
            )
        if self.has_own_loss and (self.positive_weights is not None or self.label_smoothing):
            raise ConfigError(
                "positive_weights and label_smoothing belong to binary cross-entropy: build them "
                "into your own loss, or set loss=null"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing}: it must be in [0, 1)")
        self._weights: Tensor | None = None
        if self.positive_weights is not None:
            try:
                self._weights = torch.as_tensor(self.positive_weights, dtype=torch.float32)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"positive_weights: they must be numbers: {error}") from None
            if not bool((self._weights.isfinite() & (self._weights > 0)).all()):
                raise ConfigError("positive_weights: they must be above 0")

    def units(self, targets: Tensor) -> float:
        """Number of labels of all samples."""
        return targets.numel()

    def full_units(self, targets: Tensor) -> int:
        return targets.numel()

    def mean_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        if self.has_own_loss:
            return super().mean_loss(prediction, targets, units)
        return self._loss(prediction, targets, "mean" if units else "sum")

    def sum_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        if self.has_own_loss:
            return super().sum_loss(prediction, targets, units)
        return self._loss(prediction, targets, "sum")

    def divergence(
        self, student: Tensor, teacher: Tensor, targets: Tensor, units: float, temperature: float
    ) -> Tensor:
        """KL of each label's probabilities, a mean over the labels, at the temperature T.

        The formula of `Classification.divergence` for two classes, present and absent.
        """
        actual, expected = student.float() / temperature, teacher.float() / temperature
        found = torch.zeros((), device=student.device)
        for sign in (1, -1):
            log_expected = F.logsigmoid(sign * expected)
            found = (
                found + (log_expected.exp() * (log_expected - F.logsigmoid(sign * actual))).sum()
            )
        return found / max(units, 1)

    def divergence_factor(self, temperature: float) -> float:
        """T^2, as for `Classification`."""
        return temperature**2

    def loss_inputs(self, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and targets of the same shape, as floats."""
        return prediction.view_as(targets), targets.to(prediction.dtype)

    def metric_inputs(self, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [n, labels], and labels that are present at a target of 0.5, int64."""
        return prediction.view_as(targets).float().sigmoid(), (targets >= 0.5).long()

    def check(self, prediction: Tensor, targets: Tensor) -> str | None:
        if _squeezed(prediction.shape) != _squeezed(targets.shape):
            return "it must be a tensor of logits of the same shape, one for each label"
        labels = targets.shape[-1] if targets.ndim > 1 else 1
        if self._weights is not None and self._weights.numel() not in (1, labels):
            return f"task.positive_weights has {self._weights.numel()} weights for {labels} labels"
        return None

    def check_values(self, targets: Tensor, shape: Sequence[int]) -> tuple[int, str] | None:
        wrong = ~((targets >= 0) & (targets <= 1))
        if not bool(wrong.any()):
            return None
        position = first_wrong(wrong)
        value = targets[position][wrong[position]].flatten()[0]
        return position, f"its target holds {float(value):g}; labels are 0 (absent) or 1 (present)"

    def _loss(self, prediction: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits, labels = self.loss_inputs(prediction, targets)
        if self.label_smoothing:
            labels = (1 - self.label_smoothing) * labels + self.label_smoothing / 2
        weights = self._weights
        if weights is not None:
            if weights.device != logits.device:
                weights = self._weights = weights.to(logits.device)
            weights = weights.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(
            logits, labels, pos_weight=weights, reduction=reduction
        )


def _squeezed(shape: Sequence[int]) -> list[int]:
    """A shape [samples, ...] without a last dimension of 1."""
    return [*shape[:-1]] if len(shape) > 1 and shape[-1] == 1 else [*shape]
