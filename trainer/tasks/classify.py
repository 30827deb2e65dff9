"""Tasks whose targets are classes: classification, language modelling, segmentation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data.split import IGNORED
from trainer.errors import ConfigError
from trainer.tasks.base import Task, first_wrong
from trainer.tasks.metrics import Accuracy, MacroF1, MeanIoU, Metric, Perplexity


@dataclass
class Classification(Task):
    """One class of several for each target: cross-entropy with integer targets.

    Logits are [..., classes], and targets int64 [...]: one per sample, or one per position of a
    sequence. Every target has the same weight, at any position.
    Losses are means over the targets that are not ignored, in nats; with `class_weights`, means
    weighted by them, as in `torch.nn.CrossEntropyLoss`.

    Args:
        class_weights: A weight for each class; None: all have the same.
        label_smoothing: Probability, in [0, 1), that is distributed over all classes (Szegedy et
            al., Rethinking the Inception Architecture, 2016, arXiv:1512.00567).
        ignore_index: Targets of this value are ignored.
    """

    kind: ClassVar[str] = "classification"
    built_in: ClassVar[Mapping[str, Callable[[], Metric]]] = {
        "accuracy": Accuracy,
        "top5_accuracy": lambda: Accuracy(5),
        "f1": MacroF1,
        "perplexity": Perplexity,
    }
    default_metrics: ClassVar[tuple[str, ...]] = ("accuracy",)
    class_dim: ClassVar[int] = -1  # of the logits

    _: KW_ONLY
    class_weights: Any = None
    label_smoothing: float = 0.0
    ignore_index: int = IGNORED

    def check_settings(self) -> None:
        if self.loss is not None and not self.has_own_loss:
            raise ConfigError(
                f"loss={self.loss}: it must be null (cross-entropy), or a mapping with the "
                "_target_ of a loss"
            )
        if self.has_own_loss and (self.class_weights is not None or self.label_smoothing):
            raise ConfigError(
                "class_weights and label_smoothing belong to cross-entropy: build them into your "
                "own loss, or set loss=null"
            )
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"label_smoothing={self.label_smoothing}: it must be in [0, 1)")
        self._weights: Tensor | None = None
        if self.class_weights is not None:
            try:
                self._weights = torch.as_tensor(self.class_weights, dtype=torch.float32)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"class_weights: they must be numbers: {error}") from None
            weights = self._weights
            if weights.ndim != 1 or not bool((weights.isfinite() & (weights >= 0)).all()):
                raise ConfigError("class_weights: they must be a list of numbers of at least 0")

    @property
    def fractional_units(self) -> bool:
        """Units are fractions if classes have weights."""
        return self._weights is not None

    def units(self, targets: Tensor) -> float:
        """Number of targets that are not ignored; with class weights, the sum of their weights."""
        targets = self._scored(targets)
        if self._weights is not None:
            counted = targets[targets != self.ignore_index]
            return float(self._weights.cpu()[counted].double().sum())
        # NumPy is faster here than torch.
        return targets.numel() - int(np.count_nonzero(targets.numpy() == self.ignore_index))

    def full_units(self, targets: Tensor) -> int:
        return self._scored(targets).numel()

    def mean_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        if self.has_own_loss:
            return super().mean_loss(prediction, targets, units)
        return self._cross_entropy(prediction, targets, "mean" if units else "sum")

    def sum_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        if self.has_own_loss:
            return super().sum_loss(prediction, targets, units)
        return self._cross_entropy(prediction, targets, "sum")

    def divergence(
        self, student: Tensor, teacher: Tensor, targets: Tensor, units: float, temperature: float
    ) -> Tensor:
        """KL(teacher / T, student / T), a mean over the targets, at the temperature T.

        With class weights it is weighted by them, as the loss is.

        Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015,
        arXiv:1503.02531.
        """
        actual, labels = self._flat(student, targets)
        expected, _ = self._flat(teacher, targets)
        found = F.kl_div(
            F.log_softmax(actual.float() / temperature, -1),
            F.log_softmax(expected.float() / temperature, -1),
            log_target=True,
            reduction="none",
        )
        ignored = labels == self.ignore_index
        if self._weights is not None:
            weights = self._weights.to(found.device)[labels.masked_fill(ignored, 0)]
            found = found * weights[:, None]
        return found.masked_fill(ignored[:, None], 0).sum() / (units or 1)

    def divergence_factor(self, temperature: float) -> float:
        """T^2, which keeps the gradient of the divergence independent of T."""
        return temperature**2

    def loss_inputs(self, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] and targets int64 [n] that are not ignored."""
        logits, targets = self._flat(prediction, targets)
        counted = targets != self.ignore_index
        if bool(counted.all()):
            return logits, targets
        return logits[counted], targets[counted]

    def check_type(self, targets: Tensor) -> str | None:
        if targets.dtype == torch.int64:
            return None
        return (
            "they must be classes, int64: targets.long(), or targets.argmax(1) if they are "
            "one-hot; or choose another task: regression for numbers, multilabel for labels of 0 "
            "or 1, custom with loss=torch.nn.CrossEntropyLoss() for probabilities"
        )

    def check(self, prediction: Tensor, targets: Tensor) -> str | None:
        expected = list(prediction.shape)
        if expected:
            del expected[self.class_dim]
        if prediction.ndim and expected == [*targets.shape]:
            return self._check_weights(prediction.shape[self.class_dim])
        advice = ""
        if targets.shape == prediction.shape:
            advice = f"; one-hot targets become classes by targets.argmax({self.class_dim})"
        elif prediction.ndim == targets.ndim and targets.shape[-1] == 1:
            advice = "; targets of shape [n, 1] become [n] by targets.squeeze(1)"
        return f"it must be a tensor of logits, with one more dimension for the classes{advice}"

    def check_values(self, targets: Tensor, shape: Sequence[int]) -> tuple[int, str] | None:
        if targets.is_floating_point() or targets.dtype == torch.bool:
            broken = targets != targets.floor() if targets.is_floating_point() else targets < 0
            position = first_wrong(broken) if bool(broken.any()) else 0
            kind = str(targets.dtype).removeprefix("torch.")
            return position, f"its target must be an integer class, not {kind}"
        classes = shape[self.class_dim]
        values = targets.numpy()  # for a few values, NumPy is faster than torch
        if values.size == 0 or (values.min() >= 0 and values.max() < classes):
            return None
        wrong = ((targets < 0) & (targets != self.ignore_index)) | (
            (targets >= classes) & (targets != self.ignore_index)
        )
        if not bool(wrong.any()):
            return None
        position = first_wrong(wrong)
        label = targets[position][wrong[position]].flatten()[0]
        if classes == 1 and label == 1:
            return position, (
                "its target is 1, but the model has one output; task=multilabel takes one "
                "output for targets of 0 and 1"
            )
        return position, (
            f"its target is {int(label)}, but the model has {classes} output"
            f"{'s' * (classes > 1)}, for targets from 0 "
            f"to {classes - 1} (and {self.ignore_index}, which is ignored)"
        )

    def _cross_entropy(self, logits: Tensor, targets: Tensor, reduction: str) -> Tensor:
        logits, targets = self._flat(logits, targets)
        weights = self._weights
        if weights is not None:
            if weights.device != logits.device:
                weights = self._weights = weights.to(logits.device)
            weights = weights.to(logits.dtype)
        return F.cross_entropy(
            logits,
            targets,
            weights,
            reduction=reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
        )

    def _flat(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [n, classes] and targets [n]."""
        return logits.flatten(0, -2), targets.flatten()

    def _scored(self, targets: Tensor) -> Tensor:
        """The targets that logits are compared with."""
        return targets

    def _check_weights(self, classes: int) -> str | None:
        if self._weights is None or len(self._weights) == classes:
            return None
        return (
            f"task.class_weights has {len(self._weights)} weights for {classes} classes; give one "
            "for each"
        )


@dataclass
class LanguageModel(Classification):
    """The next token at each position: logits [samples, time, vocabulary], targets [samples, time].

    Losses and metrics are means over all tokens that are not padding, wherever they are: neither
    the number of workers nor gradient accumulation changes them. The first metric is perplexity.

    Args:
        shift: Whether the targets are the input tokens themselves, so that the logits at position t
            are compared with the target at t + 1, as in transformers. False: the data has shifted
            them already.
        ignore_index: Targets of this value are padding.
    """

    kind: ClassVar[str] = "language_model"
    default_metrics: ClassVar[tuple[str, ...]] = ("perplexity", "accuracy")

    _: KW_ONLY
    shift: bool = False

    def check(self, prediction: Tensor, targets: Tensor) -> str | None:
        if self.shift and targets.ndim == 2 and targets.shape[1] < 2:
            return "task.shift=true needs at least two tokens per sample"
        return super().check(prediction, targets)

    def _flat(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.shift:
            logits = logits[:, :-1]
        return logits.flatten(0, -2), self._scored(targets).flatten()

    def _scored(self, targets: Tensor) -> Tensor:
        return targets[:, 1:] if self.shift else targets


@dataclass
class Segmentation(Classification):
    """A class for each pixel: logits [samples, classes, ...], targets int64 [samples, ...].

    The first metric is the mean intersection over union of the classes that occur.

    Args:
        ignore_index: Pixels of this value are ignored; 255 in many data sets.
    """

    kind: ClassVar[str] = "segmentation"
    built_in: ClassVar[Mapping[str, Callable[[], Metric]]] = {
        **Classification.built_in,
        "miou": MeanIoU,
    }
    default_metrics: ClassVar[tuple[str, ...]] = ("miou", "accuracy")
    class_dim: ClassVar[int] = 1

    def check(self, prediction: Tensor, targets: Tensor) -> str | None:
        problem = super().check(prediction, targets)
        if problem is not None and (prediction.ndim < 2 or prediction.ndim != targets.ndim + 1):
            return "it must be a tensor of logits [samples, classes, ...], such as NCHW"
        if problem is not None and [*prediction.shape[2:]] != [*targets.shape[1:]]:
            return "its height and width must be those of the target; interpolate in the model"
        return problem

    def _flat(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return logits.movedim(1, -1).flatten(0, -2), targets.flatten()
