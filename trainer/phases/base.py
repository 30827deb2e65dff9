"""The base classes of phases: a phase changes the representation of a model, trains it, and
changes it back.

Phases do not know one another. Each finds plain weights and leaves plain weights. What a phase did
is visible in their values (a pruned weight is zero) and, after quantization, in the quantizers
stored beside them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field, replace
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from trainer.config import FitConfig
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.messages import RoundRecord

STRUCTURE = "structure"
"""The property of a model that has fewer channels than the dense one. No phase can destroy it."""


class Evaluate(Protocol):
    """Evaluates a model on the validation split: a collective call, and the same result everywhere.

    `after` is a phase that a copy of the model goes through first, training included, as it would
    in this place of the run. Only `search` may ask for that.
    """

    def __call__(self, model: nn.Module, after: "Phase | None" = None) -> Metrics: ...


@dataclass
class Phase:
    """Base class of all phases. A subclass is a dataclass whose fields are the phase's settings.

    Override the methods that you need; `Phase` itself trains the model as it is. Every rank runs
    the same phase on the same weights, and every method must leave the same weights on all ranks.

    Args:
        fit: How the phase trains. With `epochs: 0` it trains nothing.
        epochs: Shorthand for `fit.epochs`.
        lr: Shorthand for `fit.lr`.
    """

    kind: ClassVar[str]  # name of this kind of phase in summary.json
    makes: ClassVar[frozenset[str]] = frozenset()  # properties it gives the weights, as "zeros"

    _: KW_ONLY
    fit: FitConfig = field(default_factory=FitConfig)
    epochs: InitVar[int | None] = None
    lr: InitVar[float | None] = None

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        if epochs is not None:
            self.fit = replace(self.fit, epochs=epochs)
        if lr is not None:
            self.fit = replace(self.fit, lr=lr)
        self.check_settings()
        for key, is_set in (
            (f"patience={self.fit.patience}", self.fit.patience is not None),
            ("keep_best=true", self.fit.keep_best),
        ):
            if is_set and self.ramps:
                raise ConfigError(
                    f"fit.{key}: {self.kind} compresses further while it trains, so that its best "
                    "evaluation is one of the first; set it in a retrain phase after this one"
                )

    @property
    def keeps(self) -> frozenset[str]:
        """Properties of the weights that training in this phase preserves, such as "zeros"."""
        return frozenset()

    @property
    def destroys(self) -> frozenset[str]:
        """Properties of the weights that this phase destroys even if it trains nothing."""
        return frozenset()

    @property
    def ramps(self) -> bool:
        """Whether the phase compresses further while it trains.

        Its evaluations cannot be compared with one another then: early ones are of a larger model.
        """
        return False

    @property
    def needs_dense_model(self) -> bool:
        """Whether the phase needs the experiment's dense model, to learn from it or to compare.

        The dense model is what the last phase before the first compressing one left, or the
        initial weights.
        """
        return bool(self.fit.distill.weight) or self.searches

    @property
    def searches(self) -> bool:
        """Whether the phase has a setting that it chooses by measuring the model (`auto`).

        Such a phase has a setting `max_drop`: how much worse than the dense model's the first
        metric may be at its end. While that is None, the experiment sets it to the phase's share of
        its limit.
        """
        return False

    @property
    def samples(self) -> int:
        """Number of training samples whose inputs `observe` gets; 0: it is not called."""
        return 0

    def check_settings(self) -> None:
        """Raise ConfigError for values that are not allowed. Called when the phase is made."""

    def check_model(self, model: nn.Module) -> None:
        """Raise ConfigError for settings that do not fit `model`. Called before training starts.

        Args:
            model: The model with its initial weights; it may be on the meta device, where tensors
                have shapes but no values. Must not be changed.
        """

    def check_inputs(self, model: nn.Module, inputs: Any) -> None:
        """Raise ConfigError for settings that do not fit `model`, if the check needs real inputs.

        Called on each worker before training starts, if `samples` is not 0. Every worker must come
        to the same result.

        Args:
            model: The model with its initial weights. Must not be changed.
            inputs: Of two training samples [2, ...], on the model's device: a tensor, or several
                in a tuple or mapping, as the data returns them; `trainer.data.tree.call_with` calls
                a model with them.
        """

    def notices(self, model: nn.Module) -> list[str]:
        """Lines to show the user before the run, such as what the phase will leave as it is.

        Args:
            model: As for `check_model`. Must not be changed.
        """
        return []

    def observe(self, model: nn.Module, world: World, inputs: Sequence[Any]) -> None:
        """Look at the model with real inputs. Called once, before everything else.

        A resumed phase calls it again, with the same model and inputs.

        Args:
            model: The model as the phase before left it. Must not be changed.
            inputs: Batches [n, ...] of `samples` training samples in all (fewer, if there are not
                so many), as for `check_inputs`, without augmentation; the same on all ranks, on the
                model's device.
        """

    def search(
        self, model: nn.Module, world: World, evaluate: Evaluate, dense: nn.Module | None
    ) -> Iterable[str]:
        """Choose settings by measuring. Called once, after `observe`; not when a phase is resumed.

        What is chosen must be in `state`, or in the plan of a `StructuralPhase`.

        Args:
            model: The model as the phase before left it; it must be so afterwards.
            evaluate: Evaluates a model on the validation split. A collective call.
            dense: The dense model, or None if `model` still is the dense model.

        Returns:
            Lines that report the search and the choice; a generator's are shown as they come.
        """
        return []

    def state(self) -> Mapping[str, Any]:
        """State for a checkpoint, in addition to the model: plain values and tensors."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. `plan_change` or `enter` is called next."""

    def enter(self, model: nn.Module, world: World) -> None:
        """Prepare the model for training, in place. The optimizer is made afterwards.

        A resumed phase calls this again and must get the same structure: do not use random numbers.
        """

    def penalty(self, model: nn.Module) -> Tensor | None:
        """A term that is added to the loss in each step, such as a regularization; None: nothing.

        Must depend on nothing but the model and the settings, and be the same on all ranks. It is
        added to the mean loss of each micro-batch.

        Returns:
            0-dim, differentiable, in the unit of the loss.
        """
        return None

    def after_step(self, model: nn.Module, world: World, step: int, total: int) -> None:
        """Called after each optimizer step.

        May change parameters in place, but not replace them, since the optimizer refers to them.
        Communicate before changing anything: if a rank is lost in a collective of `world`, the
        model and the phase must be as before, since the others continue from there.

        Args:
            step: Number of steps done; 1 after the first.
            total: Number of steps of the fit.
        """

    def leave(self, model: nn.Module) -> None:
        """Turn everything that `enter` installed back into plain weights under their old names.

        A phase that changes the structure permanently records the change (see `StructuralPhase`).
        """


# Reading `phase.epochs` returns the value in `fit`, which also makes `dataclasses.replace` work.
setattr(Phase, "epochs", property(lambda phase: phase.fit.epochs))  # noqa: B010 - for mypy
setattr(Phase, "lr", property(lambda phase: phase.fit.lr))  # noqa: B010


@dataclass
class RoundPhase(Phase):
    """A phase of several rounds: each plans, enters, trains and leaves, until one is the last."""

    @property
    def max_rounds(self) -> int:
        """The number of rounds at most."""
        raise NotImplementedError

    def plan_round(
        self, model: nn.Module, world: World, evaluate: Evaluate, dense: nn.Module | None
    ) -> None:
        """Called before each `enter`, except when a round is resumed. May evaluate models.

        Args:
            evaluate: Evaluates a model on the validation split. A collective call.
            dense: The dense model, or None if `model` still is the dense model.
        """
        raise NotImplementedError

    def end_round(self, model: nn.Module, world: World, metrics: Metrics) -> RoundRecord:
        """Called after each `leave`: decide whether to keep the round, and whether to stop.

        May restore the weights of an earlier round.

        Args:
            metrics: Of `model` on the validation split.
        """
        raise NotImplementedError


@dataclass
class StructuralPhase(Phase):
    """A phase that changes the structure of the model permanently, such as removing filters.

    The change is made in two steps: `plan_change` decides, from the trained weights, and
    `apply_change` makes the change. What was decided is stored with the weights in checkpoints and
    model files, and `apply_change` is called again on a freshly built model before such weights are
    loaded into it.
    """

    def plan_change(self, model: nn.Module, world: World) -> dict[str, Any]:
        """Decide on the change without making it. Called once, before `enter`.

        Returns:
            What `apply_change` needs: plain values that JSON can hold. Every rank must return the
            same.
        """
        raise NotImplementedError

    @staticmethod
    def apply_change(model: nn.Module, change: dict[str, Any]) -> None:
        """Change the structure of `model` in place. Its weights may be trained or fresh.

        Args:
            change: What `plan_change` returned.
        """
        raise NotImplementedError
