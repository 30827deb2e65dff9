"""Local steps: each rank trains on its own for some steps, then the ranks average their weights.

DiLoCo: Douillard et al., Distributed Low-Communication Training of Language Models, 2023
(arXiv:2311.08105). The mean change of the weights since the last average is the gradient of an
outer optimizer, SGD with Nesterov momentum.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from trainer.config import AllReduceConfig
from trainer.engine.optim import load_state
from trainer.engine.reducer import Reducer
from trainer.engine.world import World


class LocalSteps:
    """Takes the place of a `Reducer`, which it uses once per round of local steps.

    After `end_step` of a step that synchronizes, all ranks have the same weights; in between, they
    differ. A group of one has nothing to average, and uses the `Reducer` itself.

    Attributes:
        extra: float32 [extras of the reducer]. In a step that synchronizes, `finish` replaces it by
            its mean over the ranks; its first value, the loss, is NaN then if the loss of a rank
            was NaN or infinite in any step of the round. In other steps it stays this rank's own,
            except the second value, the request, which becomes 0.
        sent_bytes: What this rank sent in the last round, divided by the number of its steps.
        synchronizes: Whether the present step ends a round; set it before `finish`.
        keeps_state: Whether the mean of a step depends on earlier steps: always.

    Args:
        reducer: Of the parameters; it averages their changes, and is closed with this object.
        parameters: Those that require no gradient are ignored.
        world: The ranks.
        config: Settings of the outer optimizer.
    """

    def __init__(
        self,
        reducer: Reducer,
        parameters: list[nn.Parameter],
        world: World,
        config: AllReduceConfig,
    ) -> None:
        self.keeps_state = True
        self.synchronizes = True
        self.sent_bytes = 0
        self.extra = torch.zeros_like(reducer.extra)
        self._reducer = reducer
        self._world = world
        self._parameters = [p for p in parameters if p.requires_grad]
        self._start = [p.detach().clone() for p in self._parameters]  # of the round
        self._outer = torch.optim.SGD(
            self._parameters,
            config.outer_lr,
            config.outer_momentum,
            nesterov=config.outer_momentum > 0,
        )
        self._steps = 0  # done in the present round
        self._poison = torch.zeros((), device=world.device)  # NaN after a loss that was not finite

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        self._reducer.zero_grad()

    def arm(self) -> None:
        """Nothing is sent during the backward pass."""

    def finish(self) -> None:
        """Make gradients dense; if this step synchronizes, average `extra`.

        Raises:
            ConnectionError, TimeoutError: As `Reducer.finish`.
        """
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                parameter.grad = parameter.grad.to_dense()
        self._poison += 0 * self.extra[0]
        if self.synchronizes:
            self.extra[0] += self._poison
            self._world.all_reduce(self.extra)
            self.extra /= self._world.size
            self._poison.zero_()
        else:
            self.extra[1] = 0

    @torch.no_grad()
    def end_step(self) -> None:
        """The optimizer has updated the weights: average them, if this step synchronizes.

        Raises:
            ConnectionError, TimeoutError: As `Reducer.finish`; the weights are then those with
                which the round began, but the rest of the state is not.
        """
        self._steps += 1
        if not self.synchronizes:
            return
        for parameter, start in zip(self._parameters, self._start, strict=True):
            parameter.grad = start - parameter
            parameter.copy_(start)
        self._reducer.finish()
        self._outer.step()
        for parameter, start in zip(self._parameters, self._start, strict=True):
            start.copy_(parameter)
        self.sent_bytes = self._reducer.sent_bytes // self._steps
        self._steps = 0

    def rescale(self, factor: float) -> None:
        """Changes of weights do not depend on the scale of the loss."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint at the end of a round needs that is the same on all ranks."""
        return {**self._reducer.state(), "outer": self._outer.state_dict()}

    def rank_state(self) -> dict[str, Any]:
        """What it needs of this rank."""
        return self._reducer.rank_state()

    def load(self, state: Mapping[str, Any], rank_state: Mapping[str, Any]) -> None:
        """Continue from what `state` and `rank_state` returned; see `Reducer.load`."""
        if self._reducer.load(state, rank_state):
            load_state(self._outer, state["outer"])

    def close(self) -> None:
        """See `Reducer.close`."""
        self._reducer.close()
