"""The training objective: the loss of the task, alone or combined with distillation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from trainer.tasks import Task


class Objective(Protocol):
    """Computes what a step minimizes."""

    def __call__(self, model: nn.Module, inputs: Any, targets: Tensor, units: float) -> Tensor:
        """The mean loss of one batch.

        Args:
            model: In training mode.
            inputs: Of the batch, as `Split.batches` yields them.
            targets: Likewise.
            units: Units of loss in the batch (`Task.units`); the caller has them on the host.

        Returns:
            The mean over the units, 0-dim, differentiable. It has no meaning if `units` is 0.
        """
        ...


class Learnable(Protocol):
    """What an objective needs of a task: see `trainer.tasks.Task`."""

    def call_with_targets(self, model: nn.Module, inputs: Any, targets: Tensor) -> Any: ...
    def prediction(self, output: Any) -> Tensor: ...
    def training_loss(self, output: Any, targets: Tensor, units: float) -> Tensor: ...
    def divergence(
        self, student: Tensor, teacher: Tensor, targets: Tensor, units: float, temperature: float
    ) -> Tensor: ...
    def divergence_factor(self, temperature: float) -> float: ...


class Supervised:
    """The loss of the task. An `Objective`."""

    def __init__(self, task: Learnable) -> None:
        self._task = task

    def __call__(self, model: nn.Module, inputs: Any, targets: Tensor, units: float) -> Tensor:
        output = self._task.call_with_targets(model, inputs, targets)
        return self._task.training_loss(output, targets, units)


class Distilled:
    """Learns from the targets and from the outputs of a teacher. An `Objective`.

    The loss is (1 - weight) L + weight F D: the loss L of the task, and the divergence D of the
    predictions of student and teacher, with a factor F (`Task.divergence`,
    `Task.divergence_factor`).
    """

    def __init__(
        self, task: Learnable, teacher: nn.Module, weight: float, temperature: float
    ) -> None:
        """Args:
        task: What is learned; it must have a divergence.
        teacher: Its weights stay as they are; it is put in evaluation mode.
        weight: Of the teacher, in [0, 1].
        temperature: Softens the predictions, above 0.
        """
        self._task = task
        self._teacher = teacher.eval().requires_grad_(False)
        self._weight = weight
        self._temperature = temperature

    def __call__(self, model: nn.Module, inputs: Any, targets: Tensor, units: float) -> Tensor:
        task = self._task
        with torch.no_grad():
            expected = task.prediction(task.call_with_targets(self._teacher, inputs, targets))
        output = task.call_with_targets(model, inputs, targets)
        actual = task.prediction(output)
        divergence = task.divergence(actual, expected, targets, units, self._temperature)
        factor = self._weight * task.divergence_factor(self._temperature)
        hard = task.training_loss(output, targets, units)
        return (1 - self._weight) * hard + factor * divergence


class Penalized:
    """The loss of another objective, and a penalty on the model itself. An `Objective`."""

    def __init__(self, objective: Objective, penalty: Callable[[nn.Module], Tensor | None]) -> None:
        """Args:
        objective: Of the task.
        penalty: Computes from the model what is added, 0-dim; None: nothing.
        """
        self._objective = objective
        self._penalty = penalty

    def __call__(self, model: nn.Module, inputs: Any, targets: Tensor, units: float) -> Tensor:
        loss = self._objective(model, inputs, targets, units)
        penalty = self._penalty(model)
        return loss if penalty is None else loss + penalty


@dataclass(frozen=True)
class _MixedOutput:
    """A model's output for mixed samples."""

    output: Any
    targets: Tensor  # of the partners
    share: float  # of the samples themselves


class Mixed:
    """A task on mixed samples, as `trainer.data.mixed.MixedSplit` yields them. A `Learnable`.

    The loss is the mean of those for the targets of a sample and of its partner, weighted by their
    shares in the input. It is computed from one forward pass.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def call_with_targets(self, model: nn.Module, inputs: Any, targets: Tensor) -> _MixedOutput:
        """Mix the samples and call the model with them."""
        everything, partners = inputs["inputs"], inputs["partners"]
        own = everything[: len(partners)]
        mixed, share = inputs["mix"].inputs(own, everything[partners])
        output = self._task.call_with_targets(model, mixed, targets)
        return _MixedOutput(output, inputs["targets"][partners], share)

    def prediction(self, output: _MixedOutput) -> Tensor:
        """As `Task.prediction`."""
        return self._task.prediction(output.output)

    def training_loss(self, output: _MixedOutput, targets: Tensor, units: float) -> Tensor:
        """The mean loss of the samples, 0-dim. Partners have the units of the samples together."""
        own = self._task.training_loss(output.output, targets, units)
        partners = self._task.training_loss(output.output, output.targets, units)
        return output.share * own + (1 - output.share) * partners

    def divergence(
        self, student: Tensor, teacher: Tensor, targets: Tensor, units: float, temperature: float
    ) -> Tensor:
        """As `Task.divergence`: that of the predictions for the mixed samples."""
        return self._task.divergence(student, teacher, targets, units, temperature)

    def divergence_factor(self, temperature: float) -> float:
        """As `Task.divergence_factor`."""
        return self._task.divergence_factor(temperature)
