"""Metrics that are exact for any number of workers.

A metric adds up statistics of samples, such as the number of right ones and of all, and computes
its value from their sums over all workers. So it is that of one process on the whole split.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from trainer.errors import ConfigError
from trainer.metrics import MAXIMIZE, MINIMIZE

Gather = Callable[[Tensor], list[Tensor]]
"""From a tensor of this worker to those of all workers in the order of ranks. A collective call."""


@runtime_checkable
class Accumulator(Protocol):
    """Collects what a metric needs during one pass over a split."""

    def add(self, prediction: Tensor, targets: Tensor) -> None:
        """Add the samples of one batch."""

    def value(self, gather: Gather) -> float:
        """The metric over the samples of all workers. A collective call."""


class Metric:
    """Base class of metrics. Override `statistics` and `value`.

    Attributes:
        direction: Whether larger values are better ("maximize") or smaller ones ("minimize").
    """

    direction = MAXIMIZE

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Statistics of a batch whose sum over batches is that of the split.

        Args:
            prediction: As the task prepares it; see the task's `metric_inputs`.
            targets: Likewise.

        Returns:
            A tensor whose shape is the same for all batches.
        """
        raise NotImplementedError

    def value(self, sums: Tensor) -> float:
        """The metric.

        Args:
            sums: Sum of the statistics of all samples, float64.
        """
        raise NotImplementedError

    def start(self) -> Accumulator:
        """A new accumulator, for one pass over a split."""
        return _Sums(self)


class _Sums:
    """The accumulator of a `Metric`."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._sums: Tensor | None = None

    def add(self, prediction: Tensor, targets: Tensor) -> None:
        found = self._metric.statistics(prediction, targets).double()
        self._sums = found if self._sums is None else self._sums + found

    def value(self, gather: Gather) -> float:
        # A worker without samples does not know the shape.
        own = torch.zeros(0, dtype=torch.float64) if self._sums is None else self._sums
        parts = [part for part in gather(own) if part.numel()]
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return float(self._metric.value(total.cpu()))


class Average(Metric):
    """The mean of a function over the samples.

    Args:
        function: From prediction and targets of a batch to values of each sample [n, ...], or to
            the mean of the batch, 0-dim.
        direction: "maximize" or "minimize".
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], direction: str = MINIMIZE
    ) -> None:
        self.function = function
        self.direction = _checked_direction(direction)

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        found = torch.as_tensor(self.function(prediction, targets), device=targets.device).double()
        if found.ndim and len(found) != len(targets):
            raise ValueError(
                f"the function returned {[*found.shape]} for {len(targets)} targets; it must "
                "return a value for each, or their mean, of no dimension"
            )
        count = found.numel() if found.ndim else len(targets)
        total = found.sum() if found.ndim else found * count
        return torch.stack([total, total.new_tensor(count)])

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


class TorchMetric:
    """A metric of torchmetrics, or an object with the same methods.

    Its states of all workers are gathered before the value is computed, and sums are float64.

    Args:
        metric: Its `update(prediction, targets)` is called for every batch.
        direction: "maximize" or "minimize"; None: by the object's `higher_is_better`.
    """

    def __init__(self, metric: Any, direction: str | None = None) -> None:
        for method in ("update", "compute", "reset", "sync"):
            if not callable(getattr(metric, method, None)):
                raise ConfigError(
                    f"a {type(metric).__name__} is not a metric of torchmetrics: it lacks {method}"
                    '; a function is passed as trainer.tasks.Average(function, "maximize")'
                )
        if direction is None:
            better = getattr(metric, "higher_is_better", None)
            if better is None:
                raise ConfigError(
                    f"{type(metric).__name__} does not state whether higher is better: use "
                    "trainer.tasks.TorchMetric with direction=maximize or minimize"
                )
            direction = MAXIMIZE if better else MINIMIZE
        self.metric = metric
        self.direction = _checked_direction(direction)

    def start(self) -> Accumulator:
        """A new accumulator, for one pass over a split."""
        return _TorchMetricStates(copy.deepcopy(self.metric))


class _TorchMetricStates:
    def __init__(self, metric: Any) -> None:
        metric.reset()
        if callable(getattr(metric, "set_dtype", None)):
            metric.set_dtype(torch.float64)
        self._metric = metric
        self._used = False

    def add(self, prediction: Tensor, targets: Tensor) -> None:
        self._metric.to(prediction.device)
        self._metric.update(prediction, targets)

    def value(self, gather: Gather) -> float:
        # All states are gathered by this project's own group of workers: torch.distributed, which
        # torchmetrics would use, knows nothing of it.
        self._metric.sync(
            dist_sync_fn=lambda state, group=None: gather(state),
            distributed_available=lambda: True,
        )
        self._metric._to_sync = False  # compute() must not synchronize once more
        return float(self._metric.compute())


class Accuracy(Metric):
    """Fraction of the targets [n] whose logit, or one of the k largest, is the largest of [n, C].

    Args:
        k: Number of largest logits that count as right.
    """

    def __init__(self, k: int = 1) -> None:
        self.k = k

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        if self.k == 1:
            right = (prediction.argmax(-1) == targets).sum()
        else:
            k = min(self.k, prediction.shape[-1])
            right = (prediction.topk(k, -1).indices == targets[..., None]).sum()
        return torch.stack([right, right.new_tensor(targets.numel())])

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


class Confusion(Metric):
    """Base of metrics of classes: true positives, false positives and false negatives of each."""

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Of logits [n, C] and classes [n]: [3, C]."""
        classes = prediction.shape[-1]
        chosen = prediction.argmax(-1)
        right = torch.bincount(targets[chosen == targets], minlength=classes)
        return torch.stack(
            [
                right,
                torch.bincount(chosen, minlength=classes) - right,
                torch.bincount(targets, minlength=classes) - right,
            ]
        )


class MacroF1(Confusion):
    """The F1 score 2 TP / (2 TP + FP + FN), averaged over the classes that occur."""

    def value(self, sums: Tensor) -> float:
        true, false_positive, false_negative = sums
        occurs = true + false_positive + false_negative > 0
        scores = 2 * true / (2 * true + false_positive + false_negative)
        return float(scores[occurs].mean())


class MeanIoU(Confusion):
    """Intersection over union TP / (TP + FP + FN), averaged over the classes that occur."""

    def value(self, sums: Tensor) -> float:
        union = sums.sum(0)
        occurs = union > 0
        return float((sums[0][occurs] / union[occurs]).mean())


class Perplexity(Metric):
    """e to the mean negative log-likelihood of the targets [n], from logits [n, C]."""

    direction = MINIMIZE

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        losses = torch.nn.functional.cross_entropy(prediction.float(), targets, reduction="none")
        total = losses.double().sum()
        return torch.stack([total, total.new_tensor(targets.numel())])

    def value(self, sums: Tensor) -> float:
        return float((sums[0] / sums[1]).exp())


class Error(Metric):
    """Mean error of the values [n, ...] of a regression.

    Args:
        power: 1: mean absolute error; 2: mean squared error.
        root: Whether to take the square root of the mean.
    """

    direction = MINIMIZE

    def __init__(self, power: int, root: bool = False) -> None:
        self.power = power
        self.root = root

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        error = (prediction.double() - targets.double()).abs() ** self.power
        return torch.stack([error.sum(), error.new_tensor(error.numel())])

    def value(self, sums: Tensor) -> float:
        mean = float(sums[0] / sums[1])
        return float(mean**0.5) if self.root else mean


class R2(Metric):
    """Coefficient of determination 1 - SS_res / SS_tot, averaged over the outputs.

    It is undefined, NaN, where all targets are equal.
    """

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Of values [n, ...]: n, sums of targets, their squares, and squared errors, [4, k]."""
        expected = targets.double().reshape(len(targets), -1)
        errors = prediction.double().reshape(len(targets), -1) - expected
        count = torch.full_like(expected[0], len(targets))
        return torch.stack([count, expected.sum(0), (expected**2).sum(0), (errors**2).sum(0)])

    def value(self, sums: Tensor) -> float:
        count, total, squares, residual = sums
        return float((1 - residual / (squares - total**2 / count)).mean())


class LabelAccuracy(Metric):
    """Fraction of the labels of a multi-label classification that are right at a threshold of 0.5.

    Args:
        exact: Count samples whose labels are all right, instead of labels.
    """

    def __init__(self, exact: bool = False) -> None:
        self.exact = exact

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        right = (prediction >= 0.5) == (targets >= 0.5)
        if self.exact:
            right = right.flatten(1).all(1)
        return torch.stack([right.sum(), right.sum().new_tensor(right.numel())])

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


class LabelF1(Metric):
    """The F1 score of the labels of a multi-label classification at a threshold of 0.5.

    Args:
        average: "micro": over all labels of all samples; "macro": the mean over labels that occur.
    """

    def __init__(self, average: str = "micro") -> None:
        self.average = average

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """Of probabilities and labels [n, ...]: twice TP, and 2 TP + FP + FN, [2, C]."""
        chosen = (prediction >= 0.5).reshape(len(targets), -1)
        given = (targets >= 0.5).reshape(len(targets), -1)
        return torch.stack([2 * (chosen & given).sum(0), chosen.sum(0) + given.sum(0)])

    def value(self, sums: Tensor) -> float:
        if self.average == "micro":
            sums = sums.sum(1, keepdim=True)
        occurs = sums[1] > 0
        return float((sums[0][occurs] / sums[1][occurs]).mean()) if occurs.any() else 0.0


AnyMetric = Metric | TorchMetric


def build_metrics(
    wanted: Sequence[str] | Mapping[str, Any],
    known: Mapping[str, Callable[[], Metric]],
    reserved: frozenset[str],
) -> dict[str, AnyMetric]:
    """The metrics of a task by name.

    Args:
        wanted: Names of built-in metrics; or a mapping from names to None (a built-in one), a
            `Metric`, or an object of torchmetrics.
        known: The built-in metrics of the task.
        reserved: Names that no metric may have.

    Raises:
        ConfigError: A name is unknown or reserved, or a value is not a metric.
    """
    named = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted)
    found: dict[str, AnyMetric] = {}
    for name, metric in named.items():
        if not re.fullmatch(r"[A-Za-z]\w*", str(name)) or name in reserved:
            raise ConfigError(
                f"metrics: {name!r} cannot be the name of a metric; choose another one, of "
                "letters, digits and _"
            )
        if metric is None:
            if name not in known:
                raise ConfigError(
                    f"metrics: there is no {name}; built-in ones of this task: "
                    f"{', '.join(known) or 'none'}; or give an object, such as one of torchmetrics"
                )
            metric = known[name]()
        elif not isinstance(metric, AnyMetric):
            try:
                metric = TorchMetric(metric)
            except ConfigError as error:
                raise ConfigError(f"metrics.{name}: {error}") from None
        found[name] = metric
    return found


def _checked_direction(direction: str) -> str:
    if direction not in (MAXIMIZE, MINIMIZE):
        raise ConfigError(f"direction={direction}: it must be {MAXIMIZE} or {MINIMIZE}")
    return direction
