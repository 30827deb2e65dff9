"""Pruning by magnitude: at once, or along a ramp during training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.compress.install import fold, install
from trainer.compress.masks import largest
from trainer.compress.parametrize import Masked, compression
from trainer.compress.select import ParameterRef, select_weights, weights
from trainer.config import FitConfig, check_choice, check_min
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.messages import RoundRecord
from trainer.phases.auto import Search
from trainer.phases.base import Measure, Phase
from trainer.phases.retrain import preserve
from trainer.phases.targets import Given, Targets


@dataclass
class Prune(Phase):
    """Set the weights of smallest magnitude to zero.

    `oneshot` prunes at the start; a fit after it trains the survivors alone, as retrain does.
    `cubic` raises the sparsity while it trains, from the present one to the final one between
    `begin` and `end` of the fit (trainer.compress.masks.cubic_sparsity). On the way all weights
    learn, and one that grew returns with the next mask; after `end` the masks rest, so that the
    survivors settle.

    The number of weights kept is exact: round((1 - sparsity) * weights), at least one, per layer or
    over all layers as `scope` says; a matrix of an LSTM or GRU with all its gates is one layer.
    Layers named by `overrides` stand alone in both scopes. Pruning never lowers the sparsity, and
    the weights that it exempts keep the zeros that they have.

    With `sparsity: auto` it prunes and trains in rounds, as far as the accuracy on validation data
    stays within `max_drop` of the dense model's (trainer.phases.auto); it ends in the last state
    that did. Each round keeps most of the layers whose loss rises most when they are pruned alone.
    As it goes to the edge on validation data, other data may fall beyond it: where the test set
    must stay within limits.max_accuracy_drop, give it a smaller max_drop.
    """

    kind: ClassVar[str] = "prune"
    makes: ClassVar[frozenset[str]] = frozenset({"zeros"})

    fit: FitConfig
    sparsity: int | float | str  # fraction of the weights that end as zero, in [0, 1) | auto
    scope: str = "layer"  # layer: every layer reaches the sparsity | global: all of them together
    min_density: float = 0.01  # smallest fraction that any layer keeps, in [0, 1]
    overrides: dict[str, float] = field(default_factory=dict)  # sparsity by name pattern
    schedule: str = "oneshot"  # oneshot | cubic
    begin: float = 0.0  # cubic: start of the ramp, a fraction of the fit's steps
    end: float = 0.75  # cubic: end of the ramp, likewise
    interval: int = 10  # cubic: steps between two masks
    include: list[str] = field(
        default_factory=lambda: ["*"]
    )  # name patterns of the weights to prune
    exempt: list[str] = field(default_factory=list)  # name patterns of those not to prune after all
    max_drop: float | None = None  # auto: of the dense model's validation accuracy, a fraction
    rounds: int = 15  # auto: at most so many times pruned and trained
    _present: dict[str, int] = field(init=False, repr=False, default_factory=dict)

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros"})

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("layer", "global"))
        check_choice("schedule", self.schedule, ("oneshot", "cubic"))
        if not 0 <= self.min_density <= 1:
            raise ConfigError(f"min_density={self.min_density}: it must be between 0 and 1")
        asked = {}
        if isinstance(self.sparsity, str):
            self._check_auto(self.sparsity)
        else:
            asked["sparsity"] = float(self.sparsity)
        asked |= {f"overrides.{pattern}": value for pattern, value in self.overrides.items()}
        for key, value in asked.items():
            if not 0 <= value < 1:
                raise ConfigError(f"{key}={value}: it must be at least 0 and below 1")
            if 1 - value < self.min_density - 1e-9:
                raise ConfigError(
                    f"{key}={value}: it keeps less than min_density={self.min_density}; lower one"
                )
        if not 0 <= self.begin < self.end <= 1:
            raise ConfigError(
                f"begin={self.begin}, end={self.end}: they must satisfy 0 <= begin < end <= 1"
            )
        if self.interval < 1:
            raise ConfigError(f"interval={self.interval}: it must be at least 1 step")
        if self.schedule == "cubic" and self.fit.epochs == 0:
            raise ConfigError("schedule=cubic with fit.epochs=0: set epochs, or schedule=oneshot")

    def check(self, model: nn.Module) -> None:
        self._chosen(model)

    @property
    def most_rounds(self) -> int:
        return self._targets.most_rounds

    @property
    def wants_dense(self) -> bool:
        return super().wants_dense or self.sparsity == "auto"

    def plan(
        self, model: nn.Module, world: World, measure: Measure, dense: nn.Module | None
    ) -> None:
        self._targets.plan(model, self._chosen(model), measure, dense)

    def judge(self, model: nn.Module, world: World, metrics: Metrics) -> RoundRecord | None:
        return self._targets.judge(model, metrics)

    def state(self) -> Mapping[str, Any]:
        return self._targets.state()

    def load(self, state: Mapping[str, Any]) -> None:
        self._targets.load(state)

    def enter(self, model: nn.Module, world: World) -> None:
        self._targets.begin(model)
        values = {name: places[0].value.detach() for name, places in self._chosen(model).items()}
        if self.schedule == "cubic":
            survivors = {name: weight != 0 for name, weight in values.items()}
            _decide(survivors, world)
            self._present = {name: int(mask.sum()) for name, mask in survivors.items()}
            install(model, {name: Masked(values[name], mask) for name, mask in survivors.items()})
        else:
            self._present = {name: weight.numel() for name, weight in values.items()}
            masks = self._masks(values, 1.0)
            _decide(masks, world)
            for name, mask in masks.items():
                values[name].masked_fill_(~mask, 0)
        if self.fit.epochs:
            preserve(model, world)  # what is not masked keeps the zeros that it has

    def after_step(self, model: nn.Module, world: World, step: int, total: int) -> None:
        if self.schedule == "oneshot":
            return
        last = max(1, math.ceil(self.end * total - 1e-9))
        if step == last or (self.begin * total <= step < last and step % self.interval == 0):
            masks = self._masks(_learnt(model), 1.0 if step == last else step / total)
            _decide(masks, world)
            _set_masks(model, masks)

    def leave(self, model: nn.Module) -> None:
        masked = _masked(model)
        if masked:
            masks = self._masks(_learnt(model), 1.0)
            if _total(masks) < _total({name: found.mask for name, found in masked.items()}):
                _set_masks(model, masks)  # training was cut short
        fold(model)

    def _chosen(self, model: nn.Module) -> dict[str, list[ParameterRef]]:
        """The weights to prune. Raises ConfigError where the settings do not fit them."""
        chosen = select_weights(model, self.include, self.exempt)
        self._targets.check({name: found[0].value.numel() for name, found in chosen.items()})
        return chosen

    @cached_property
    def _targets(self) -> Targets:
        if isinstance(self.sparsity, str):
            assert self.max_drop is not None  # _check_auto
            return Search(self.max_drop, self.rounds, self.min_density)
        ramp = (self.begin, self.end) if self.schedule == "cubic" else None
        return Given(self.sparsity, self.scope, self.min_density, self.overrides, ramp)

    def _check_auto(self, sparsity: str) -> None:
        if sparsity != "auto":
            raise ConfigError(f"sparsity={sparsity}: it must be a number in [0, 1), or auto")
        if self.max_drop is None:
            raise ConfigError(
                "sparsity=auto with max_drop=null: say how far the accuracy may fall, such as "
                "limits.max_accuracy_drop=0.002, which max_drop follows"
            )
        check_min("max_drop", self.max_drop, 0)
        check_min("rounds", self.rounds, 1)
        if self.fit.epochs == 0:
            raise ConfigError("sparsity=auto with fit.epochs=0: each round trains; set epochs")
        if (self.schedule, self.scope, self.overrides) != ("oneshot", "layer", {}):
            raise ConfigError(
                f"sparsity=auto with schedule={self.schedule}, scope={self.scope}, overrides="
                f"{self.overrides}: each round prunes at its start, each layer by its sensitivity; "
                "set schedule=oneshot, scope=layer and no overrides"
            )

    def _masks(self, latent: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        """The masks that the magnitudes ask for at `progress` of the fit."""
        counts = self._targets.keep(latent, self._present, progress)
        return {name: largest(weight, counts[name]) for name, weight in latent.items()}


def _masked(model: nn.Module) -> dict[str, Masked]:
    """The weights that are masked, by name."""
    found = {name: compression(*places[0]) for name, places in weights(model).items()}
    return {name: masked for name, masked in found.items() if isinstance(masked, Masked)}


def _learnt(model: nn.Module) -> dict[str, Tensor]:
    """The learnt tensors behind the masked weights, by name."""
    places = weights(model)
    return {name: places[name][0].trainable.detach() for name in _masked(model)}


def _set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, masked in _masked(model).items():
        masked.mask.copy_(masks[name])


def _total(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _decide(masks: Mapping[str, Tensor], world: World) -> None:
    """Rank 0 decides: all ranks compute masks from the same bits, and then take rank 0's."""
    world.broadcast(masks.values())
