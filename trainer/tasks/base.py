"""The base class of tasks, which define the loss and the metrics."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.data.tree import call_with
from trainer.errors import ConfigError
from trainer.messages import TRIAL_MEASURES, EpochEnded, Evaluated, PhaseRecord, RoundRecord
from trainer.metrics import LOSS, MINIMIZE
from trainer.tasks import output as outputs
from trainer.tasks.metrics import AnyMetric, Metric, build_metrics

_RESERVED = frozenset(
    field.name
    for record in (EpochEnded, Evaluated, PhaseRecord, RoundRecord)
    for field in dataclasses.fields(record)
) | {
    *("ratio", "published", "status", "error", "layers", "stages", "path", "workers"),
    *TRIAL_MEASURES,
}


@dataclass
class Task:
    """Base class of all tasks. A subclass is a dataclass whose fields are the task's settings.

    A task defines how a batch becomes a call of the model (`call`), how its output becomes a
    prediction (`prediction`), the loss (`loss`), how many units of loss a batch contains (`units`),
    so that micro-batches and workers are weighted exactly, and the metrics. The first metric is
    what limits, the search for sparsity, sweeps and reports use.

    Args:
        loss: None: the task's own. Or a function or module that is called with the prediction and
            the targets of a batch (see `loss_inputs`), and returns their mean loss, or one loss for
            each unit.
        metrics: Names of built-in metrics, the first one first; or a mapping from names to None (a
            built-in one), a `Metric`, or an object of torchmetrics. None: those of the task.
        output: Name or position of the prediction in what the model returns. None: the tensor
            itself; the first element of a tuple; `logits`, `out` or `prediction` of others.
        auxiliary: Weight, in the training loss, of the predictions of auxiliary heads, which are
            outputs whose names begin with "aux".
    """

    kind: ClassVar[str] = "custom"  # name of this kind of task in summary.json
    built_in: ClassVar[Mapping[str, Callable[[], Metric]]] = {}  # metrics that a name selects
    default_metrics: ClassVar[tuple[str, ...]] = ()

    loss: Any = None
    _: KW_ONLY
    metrics: Any = None
    output: Any = None
    auxiliary: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.auxiliary < float("inf"):
            raise ConfigError(f"auxiliary={self.auxiliary}: it must be at least 0")
        wanted = self.default_metrics if self.metrics is None else self.metrics
        if isinstance(wanted, str) or not isinstance(wanted, Sequence | Mapping):
            raise ConfigError(f"metrics={wanted}: it must be a list of names, or a mapping")
        self._measured = build_metrics(wanted, self.built_in, _RESERVED)
        if self.has_own_loss:
            _check_loss(self.loss)
        self.check_settings()

    def check_settings(self) -> None:
        """Raise ConfigError for values that are not allowed. Called when the task is made."""

    @property
    def measured(self) -> dict[str, AnyMetric]:
        """The metrics by name, in order."""
        return self._measured

    @property
    def directions(self) -> dict[str, str]:
        """Of each metric: "maximize" or "minimize". Without metrics, of the loss."""
        found = {name: metric.direction for name, metric in self._measured.items()}
        return found or {LOSS: MINIMIZE}

    @property
    def first_metric(self) -> str:
        """Name of the metric that limits, sparsity=auto, sweeps and reports use."""
        return next(iter(self.directions))

    @property
    def has_own_loss(self) -> bool:
        """Whether the loss is a function or module of the user's."""
        return callable(self.loss)

    @property
    def has_loss_of_prediction(self) -> bool:
        """Whether that is called with the prediction."""
        return self.has_own_loss

    @property
    def fractional_units(self) -> bool:
        """Whether `units` may return fractions."""
        return False

    @property
    def needs_prediction(self) -> bool:
        """Whether the loss or the metrics need a prediction in the model's output."""
        return True

    def to(self, device: torch.device) -> None:
        """Move the modules among the settings, such as a loss, to a device."""
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)

    def call(self, model: nn.Module, inputs: Any) -> Any:
        """Call the model with the inputs of a batch.

        Args:
            model: The model.
            inputs: A tensor is the argument, a tuple the positional ones, a mapping those by
                keyword.

        Returns:
            The model's output.
        """
        return call_with(model, inputs)

    def call_with_targets(self, model: nn.Module, inputs: Any, targets: Tensor) -> Any:
        """As `call`, for models that need the targets as well, such as to compute the loss."""
        return self.call(model, inputs)

    def prediction(self, output: Any) -> Tensor:
        """The prediction in a model's output: see the setting `output`.

        Raises:
            ValueError: There is none.
        """
        return outputs.prediction(output, self.output)

    def units(self, targets: Tensor) -> float:
        """Units of loss in a batch, by default its samples.

        Losses are means over units. A target that is ignored does not count.

        Args:
            targets: On the CPU.
        """
        return len(targets)

    def full_units(self, targets: Tensor) -> int:
        """Units of loss if no target were ignored."""
        return len(targets)

    def mean_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        """The mean loss of a batch over its units, 0-dim, differentiable; 0 if there are none.

        Args:
            prediction: Of `prediction`.
            targets: Of the batch, on the same device.
            units: Of `units`.
        """
        if not self.has_own_loss:
            raise NotImplementedError
        if not units:
            return zero_of([prediction])
        return self._own_loss(*self.loss_inputs(prediction, targets), targets, units)

    def _own_loss(self, output: Any, expected: Tensor, targets: Tensor, units: float) -> Tensor:
        """The mean of a loss of the user's, which is called with `output` and `expected`."""
        found = self.loss(output, expected)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"the loss must return a tensor of losses or their mean, not a "
                f"{type(found).__name__}"
            )
        if not found.ndim:
            return found
        # Of mixed samples, `units` are those of the samples, and the targets perhaps the partners'.
        rows = expected.ndim == 1 and found.shape == expected.shape
        if not rows and found.numel() not in (units, self.full_units(targets)):
            raise ValueError(
                f"the loss returned {[*found.shape]} for targets {[*targets.shape]}; it must "
                f"return their mean, of no dimension, or one loss for each unit: {units:g}"
            )
        return found.sum() / units

    def sum_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        """The sum of the losses of the units, for evaluation."""
        return self.mean_loss(prediction, targets, units) * units

    def training_loss(self, output: Any, targets: Tensor, units: float) -> Tensor:
        """The mean loss of a model's output in training, auxiliary heads included."""
        found = self.mean_loss(self.prediction(output), targets, units)
        if self.auxiliary and not isinstance(output, Tensor):
            for prediction in outputs.auxiliary(output):
                found = found + self.auxiliary * self.mean_loss(prediction, targets, units)
        return found

    def evaluation_loss(self, output: Any, targets: Tensor, units: float) -> Tensor:
        """The sum of the losses of a model's output in evaluation, in fp32 arithmetic."""
        return self.sum_loss(self.prediction(output).float(), targets, units)

    def divergence(
        self, student: Tensor, teacher: Tensor, targets: Tensor, units: float, temperature: float
    ) -> Tensor:
        """The mean over the units of the distance between two predictions, for distillation.

        Args:
            student: Prediction of the model.
            teacher: Prediction of the dense model.
            targets: Of the batch; those that are ignored must not count here either.
            units: Of the targets.
            temperature: Softens the predictions.

        Raises:
            NotImplementedError: The task has none.
        """
        raise NotImplementedError

    def divergence_factor(self, temperature: float) -> float:
        """Factor of the divergence in the training loss, in addition to `distill.weight`."""
        return 1.0

    @property
    def can_distill(self) -> bool:
        """Whether the task has a `divergence`."""
        return type(self).divergence is not Task.divergence

    def loss_inputs(self, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and targets as a loss of the user's takes them."""
        return prediction, targets

    def metric_inputs(self, prediction: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction and targets as the metrics take them."""
        return self.loss_inputs(prediction, targets)

    def check_type(self, targets: Tensor) -> str | None:
        """The problem with the type of targets, as the end of a sentence; None: there is none."""
        return None

    def check(self, prediction: Tensor, targets: Tensor) -> str | None:
        """The problem with a prediction's shape, as the end of a sentence; None: there is none.

        Args:
            prediction: Of one sample, [1, ...].
            targets: Likewise.
        """
        return None

    def check_values(self, targets: Tensor, shape: Sequence[int]) -> tuple[int, str] | None:
        """Find a target that cannot be used.

        Args:
            targets: Of several samples [n, ...], on the CPU.
            shape: Of the prediction for one sample, [1, ...].

        Returns:
            Its position, and what is wrong with it; None: all can be used.
        """
        return None


def zero_of(tensors: Sequence[Tensor]) -> Tensor:
    """0, whose gradient is 0 for all that the tensors depend on, even where they are Inf or NaN."""
    parts = [torch.where(tensor.isfinite(), tensor, 0).mul(0.0).sum().real for tensor in tensors]
    return torch.stack(parts).sum()


def first_wrong(wrong: Tensor) -> int:
    """Position of the first sample [n, ...] with a true entry."""
    return int(wrong.reshape(len(wrong), -1).any(1).nonzero()[0])


def _check_loss(loss: Any) -> None:
    """Refuse a loss that cannot be weighted exactly, or that has parameters of its own."""
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise ConfigError(
            f"loss: {type(loss).__name__} has trainable parameters, which no optimizer would "
            "change; make them a part of the model"
        )
    if getattr(loss, "reduction", "mean") not in ("mean", "none"):
        raise ConfigError(
            f"loss: {type(loss).__name__} has reduction={loss.reduction}; it must be mean or none"
        )
    if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and loss.weight is not None:
        raise ConfigError(
            f"loss: a mean of {type(loss).__name__} with weights depends on how the batch is split "
            "over the workers; use trainer.tasks.Classification with class_weights"
        )
