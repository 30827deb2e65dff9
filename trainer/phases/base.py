"""What a phase is: what happens to a model before, during and after a stretch of training.

Phases know nothing of one another. They find plain weights and leave plain weights; what one did to
them shows in their values (pruned is zero) and, where it quantized them, in the grids beside them.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import nn

from trainer.config import FitConfig
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.messages import RoundRecord

Measure = Callable[[nn.Module], Metrics]
"""Metrics of a model on validation data, the same on all ranks."""


class Phase:
    """The base of all phases. Overwrite what you need; alone, it just trains.

    Every rank runs the same phase on the same bits, and every rank must end each method with the
    same bits in its model.
    """

    kind: ClassVar[str]  # what summary.json calls it
    makes: ClassVar[frozenset[str]] = frozenset()  # what later phases must keep, such as "zeros"
    fit: FitConfig  # how it trains; epochs 0: not at all

    @property
    def keeps(self) -> frozenset[str]:
        """What its training does not destroy, such as "zeros"."""
        return frozenset()

    @property
    def destroys(self) -> frozenset[str]:
        """What it destroys even where it trains nothing, such as "sharing"."""
        return frozenset()

    def check(self, model: nn.Module) -> None:
        """Refuse settings that do not fit `model`. Called before anything starts.

        Args:
            model: perhaps on the meta device: shapes and names without values.

        Raises:
            ConfigError: names the setting, its value and what would be right.
        """

    def enter(self, model: nn.Module, world: World) -> None:
        """Prepare the model for training, in place. The optimizer is made afterwards.

        Must not depend on chance, so that a resumed run that enters again gets the same model.
        """

    def after_step(self, model: nn.Module, world: World, step: int, total: int) -> None:
        """Called after each optimizer step: `step` of `total` are done (the first is 1).

        May change values in place, but not replace parameters: the optimizer knows those.
        """

    def leave(self, model: nn.Module) -> None:
        """Turn everything that `enter` installed back into plain weights, under their old names.

        A phase that changes layers for good leaves names from which
        `trainer.compress.rewrite.apply_structure` finds the change, as quantize does.
        """

    @property
    def most_rounds(self) -> int:
        """How often at most it plans, enters, trains and leaves. Most phases do it once."""
        return 1

    @property
    def wants_dense(self) -> bool:
        """Whether it needs the experiment's dense model: to learn from it, or to compare with it.

        That is what the last phase before the first compressing one left, or the initial weights.
        """
        return bool(self.fit.distill.weight)

    def plan(
        self, model: nn.Module, world: World, measure: Measure, dense: nn.Module | None
    ) -> None:
        """Called before each `enter`, but where a round is resumed. May measure models.

        Args:
            dense: the dense model, where `wants_dense`; None where `model` still is it.
        """

    def judge(self, model: nn.Module, world: World, metrics: Metrics) -> RoundRecord | None:
        """Called after each `leave`: what the round came to, and whether it was the last one.

        May put the model back to an earlier state. None: there are no rounds, this was all.
        """
        return None

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint must keep beside the model: plain values and tensors."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, in the round in which it was taken; `enter` comes next."""
