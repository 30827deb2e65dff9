"""What training minimizes: cross-entropy with the targets, alone or together with a teacher.

A target of `IGNORED` (-100, PyTorch's convention) has no say: padding of a sentence, for example.
All other targets are called counted. Losses are means over the counted targets.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.data.split import IGNORED


class Objective(Protocol):
    """Computes what a step minimizes."""

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor, counted: int) -> Tensor:
        """The mean loss of one batch.

        Args:
            model: In training mode.
            inputs: Of the batch [samples, ...].
            targets: int64 classes [samples, ...], or IGNORED.
            counted: Number of targets that are not IGNORED; the caller has them on the host.

        Returns:
            The mean over the counted targets, 0-dim, in nats, differentiable; 0 if `counted` is 0.
        """
        ...


def count_targets(targets: Tensor) -> int:
    """Number of targets on the CPU that are not IGNORED."""
    ignored = np.count_nonzero(targets.numpy() == IGNORED)  # faster than in torch
    return targets.numel() - int(ignored)


def cross_entropy(logits: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats of logits [..., classes] with integer targets [...].

    Every counted target has the same weight, whichever of the leading dimensions it belongs to; so
    the logits of a language model, [samples, time, vocabulary], need no reshaping.
    """
    return F.cross_entropy(
        logits.flatten(0, -2), targets.flatten(), reduction=reduction, ignore_index=IGNORED
    )


def supervised(model: nn.Module, inputs: Tensor, targets: Tensor, counted: int) -> Tensor:
    """Cross-entropy with the targets. An `Objective`."""
    return cross_entropy(model(inputs), targets, "mean" if counted else "sum")


class Distilled:
    """Learns from the targets and from the outputs of a teacher. An `Objective`.

    The loss is (1 - weight) CE(student, targets) + weight T^2 KL(teacher / T, student / T) with
    temperature T: Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015,
    arXiv:1503.02531. The factor T^2 keeps the gradient of the second term independent of T.
    """

    def __init__(self, teacher: nn.Module, weight: float, temperature: float) -> None:
        """Args:
        teacher: Its weights stay as they are; it is put in evaluation mode.
        weight: Of the teacher, in [0, 1].
        temperature: Above 0.
        """
        self._teacher = teacher.eval().requires_grad_(False)
        self._weight = weight
        self._temperature = temperature

    def __call__(self, model: nn.Module, inputs: Tensor, targets: Tensor, counted: int) -> Tensor:
        with torch.no_grad():
            expected = self._log_probabilities(self._teacher(inputs))
        logits = model(inputs)
        actual = self._log_probabilities(logits)
        divergence = F.kl_div(actual, expected, log_target=True, reduction="none")
        ignored = targets.flatten() == IGNORED
        divergence = divergence.masked_fill(ignored[:, None], 0).sum() / max(counted, 1)
        hard = cross_entropy(logits, targets, "mean" if counted else "sum")
        return (1 - self._weight) * hard + self._weight * self._temperature**2 * divergence

    def _log_probabilities(self, logits: Tensor) -> Tensor:
        """Of logits [..., classes] at the temperature: [targets, classes]."""
        return F.log_softmax(logits.flatten(0, -2).float() / self._temperature, -1)
