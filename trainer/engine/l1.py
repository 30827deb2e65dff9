"""Stochastic gradient descent with an L1 penalty."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class L1SGD(torch.optim.SGD):
    """`torch.optim.SGD` that adds `l1` times the sign of each parameter to its gradient.

    That is the gradient of l1 * sum |w|, as in the regularized training that Han et al. (NIPS 2015,
    arXiv:1506.02626, section 3.1) prune after. Settings besides `l1` as of `torch.optim.SGD`.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        l1: float = 0.0,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        fused: bool | None = None,
    ) -> None:
        if l1 < 0:
            raise ValueError(f"l1={l1}: it must be at least 0")
        super().__init__(
            params,
            lr,
            momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            fused=fused,
        )
        for group in self.param_groups:
            group.setdefault("l1", l1)  # a group may have its own

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor | None:  # type: ignore[override]
        """Add the penalty's gradient, and update the parameters."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.sign(), alpha=group["l1"])
        found: Tensor | None = super().step(closure)
        return found
