"""What training minimises: the error against the labels, or also against a teacher."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""`objective(model, inputs, targets)`: the mean loss of a batch, 0-dim, in nats."""


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits [..., classes] against integer targets [...].

    Every leading dimension counts alike, so a language model's [batch, time, vocabulary] works.
    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction=reduction)


def supervised(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Learn from the labels alone."""
    return cross_entropy(model(inputs), targets)


class Distilled:
    """Learn from the labels and from what a teacher makes of the same inputs.

    (1 - weight) * CE(student, labels) + weight * T^2 * KL(teacher / T, student / T), as in Hinton,
    Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015, arXiv:1503.02531: T^2 keeps
    the gradients of the soft targets in scale.
    """

    def __init__(self, teacher: nn.Module, weight: float, temperature: float) -> None:
        """Args: teacher: is put in evaluation mode; its weights stay as they are."""
        self._teacher = teacher.eval().requires_grad_(False)
        self._weight = weight
        self._temperature = temperature

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """An `Objective`."""
        with torch.no_grad():
            taught = self._soft(self._teacher(inputs))
        logits = model(inputs)
        divergence = F.kl_div(self._soft(logits), taught, log_target=True, reduction="batchmean")
        hard = cross_entropy(logits, targets)
        return (1 - self._weight) * hard + self._weight * self._temperature**2 * divergence

    def _soft(self, logits: Tensor) -> Tensor:
        """Log-probabilities [samples, classes] at the temperature."""
        return F.log_softmax(logits.flatten(0, -2).float() / self._temperature, -1)
