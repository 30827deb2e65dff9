"""check_task accepts the tasks of the package and refuses broken ones."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from trainer.tasks import (
    Classification,
    Custom,
    LanguageModel,
    Metric,
    MultiLabel,
    Regression,
    Task,
)
from trainer.testing import check_task

torch.manual_seed(0)
MODEL = nn.Linear(4, 3)
INPUTS = torch.randn(6, 4)
CLASSES = torch.tensor([0, 1, 2, -100, 1, 0])
NUMBERS = torch.rand(6, 3)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 7)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.layer(torch.cat([left, right], -1))}


@pytest.mark.parametrize(
    ("task", "targets"),
    [
        (Classification(class_weights=[1, 2, 3], metrics=["f1", "accuracy"]), CLASSES),
        (Regression("huber"), NUMBERS),
        (MultiLabel(label_smoothing=0.1, positive_weights=[1, 2, 3]), NUMBERS.round()),
    ],
)
def test_tasks_of_the_package(task: Task, targets: Tensor) -> None:
    check_task(task, MODEL, INPUTS, targets)


def test_several_inputs() -> None:
    inputs = {"left": torch.randn(4, 5, 4), "right": torch.randn(4, 5, 4)}
    check_task(LanguageModel(), Pair(), inputs, torch.randint(7, (4, 5)))


@dataclass
class Quantile(Task):
    """The 90% quantile of the targets."""

    kind: ClassVar[str] = "quantile"

    def units(self, targets: Tensor) -> float:
        return targets.numel()

    def full_units(self, targets: Tensor) -> int:
        return targets.numel()

    def mean_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        error = targets - prediction
        return torch.maximum(0.9 * error, -0.1 * error).mean()


class Squares(Metric):
    """The square of a sum is not the sum of squares."""

    def statistics(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return (prediction.sum() - 9) ** 2

    def value(self, sums: Tensor) -> float:
        return float(sums)


@dataclass
class WrongUnits(Quantile):
    def units(self, targets: Tensor) -> float:
        return 3


@dataclass
class WrongFullUnits(Quantile):
    def full_units(self, targets: Tensor) -> int:
        return len(targets)


@dataclass
class Sum(Quantile):
    def mean_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        return (targets - prediction).abs().sum()


@dataclass
class Rows(Quantile):
    def mean_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        return (targets - prediction).abs().mean(0, keepdim=True)[0]


@dataclass
class Constant(Quantile):
    def mean_loss(self, prediction: Tensor, targets: Tensor, units: float) -> Tensor:
        return 0 * prediction.sum() + 1


@dataclass
class WrongMetric(Quantile):
    built_in: ClassVar[Mapping[str, Callable[[], Metric]]] = {"squares": Squares}
    default_metrics: ClassVar[tuple[str, ...]] = ("squares",)


def test_a_task_of_ones_own() -> None:
    check_task(Quantile(), MODEL, INPUTS, NUMBERS)


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layer(inputs) - targets).square().mean()}


def test_a_model_that_returns_its_loss_alone() -> None:
    check_task(Custom("model", target_argument="targets"), OwnLoss(), INPUTS, NUMBERS)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WrongUnits, "units of the parts"),
        (WrongFullUnits, r"full_units is 6, less than WrongFullUnits\.units: 18"),
        (Sum, "the loss of two parts, weighted by units"),
        (Rows, r"the mean loss must have no dimensions, not \[3\]"),
        (Constant, "the loss has no gradient"),
        (WrongMetric, "metric squares of two workers"),
    ],
)
def test_broken_tasks(kind: Any, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        check_task(kind(), MODEL, INPUTS, NUMBERS)
