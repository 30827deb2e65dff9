"""Pruning by magnitude: at once, or along a ramp during training."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.compress.counts import counts
from trainer.compress.install import fold, install
from trainer.compress.masks import cubic_sparsity, largest, share
from trainer.compress.parametrize import Masked, compression
from trainer.compress.select import Place, choose, match, weights
from trainer.config import FitConfig, at_least, one_of
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.messages import RoundRecord
from trainer.phases.auto import Search
from trainer.phases.base import Measure, Phase
from trainer.phases.retrain import preserve


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
    stays within `max_drop` of what it was before (trainer.phases.auto); it ends in the last state
    that did. Each round keeps most of the layers whose loss rises most when they are pruned alone.
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
    max_drop: float | None = None  # auto: of validation accuracy, against that before; a fraction
    rounds: int = 15  # auto: at most so many times pruned and trained
    _present: dict[str, int] = field(init=False, repr=False, default_factory=dict)

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros"})

    def __post_init__(self) -> None:
        one_of("scope", self.scope, ("layer", "global"))
        one_of("schedule", self.schedule, ("oneshot", "cubic"))
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
        return self.rounds if self._search else 1

    def plan(self, model: nn.Module, world: World, measure: Measure) -> None:
        if self._search:
            layers = self._chosen(model)
            floors = {n: self._floor(found[0].value.numel()) for n, found in layers.items()}
            self._search.plan(model, layers, floors, measure)

    def judge(self, model: nn.Module, world: World, metrics: Metrics) -> RoundRecord | None:
        if not self._search:
            return None
        return self._search.judge(model, metrics, counts(model).sparsity)

    def state(self) -> Mapping[str, Any]:
        return self._search.state() if self._search else {}

    def load(self, state: Mapping[str, Any]) -> None:
        if self._search:
            self._search.load(state)

    def enter(self, model: nn.Module, world: World) -> None:
        if self._search:  # a resumed round begins where it began
            model.load_state_dict(self._search.good)
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
        if masked and not self._finished(masked):  # training was cut short
            _set_masks(model, self._masks(_learnt(model), 1.0))
        fold(model)

    def _chosen(self, model: nn.Module) -> dict[str, list[Place]]:
        """The weights to prune. Raises ConfigError where the settings do not fit them."""
        chosen = choose(model, self.include, self.exempt)
        if self._search:
            return chosen
        sizes = {name: found[0].value.numel() for name, found in chosen.items()}
        _, pool, keep = self._targets(sizes, sizes, 1.0)
        if sum(self._floor(sizes[name]) for name in pool) > keep:
            raise ConfigError(
                f"sparsity={self.sparsity} keeps {keep} of these weights, fewer than "
                f"min_density={self.min_density} of each layer, at least one, needs: lower one"
            )
        return chosen

    def _targets(
        self, sizes: Mapping[str, int], present: Mapping[str, int], progress: float
    ) -> tuple[dict[str, int], list[str], int]:
        """How many weights to keep at `progress`: of each layer that stands alone, and then of the
        layers that share a threshold, all together.

        Args:
            sizes: weights of each layer.
            present: how many of them were not zero when the phase began.
        """
        if self._search:
            return self._search.targets, [], 0
        assert not isinstance(self.sparsity, str)
        alone = match(self.overrides, sizes)
        if self.scope == "layer":
            alone = dict.fromkeys(sizes, self.sparsity) | alone
        pool = [name for name in sizes if name not in alone]
        size, there = sum(sizes[n] for n in pool), sum(present[n] for n in pool)
        counts = {n: self._keep(sizes[n], present[n], s, progress) for n, s in alone.items()}
        return counts, pool, self._keep(size, there, self.sparsity, progress) if pool else 0

    def _keep(self, size: int, present: int, sparsity: float, progress: float) -> int:
        initial = 1 - present / size
        if self.schedule == "cubic":
            final = max(initial, sparsity)
            sparsity = cubic_sparsity(progress, initial, final, self.begin, self.end)
        return max(1, round((1 - sparsity) * size))

    @cached_property
    def _search(self) -> Search | None:
        """Where sparsity=auto stands; None for a given sparsity."""
        return (
            None
            if self.max_drop is None or self.sparsity != "auto"
            else Search(self.max_drop, self.rounds)
        )

    def _check_auto(self, sparsity: str) -> None:
        if sparsity != "auto":
            raise ConfigError(f"sparsity={sparsity}: it must be a number in [0, 1), or auto")
        if self.max_drop is None:
            raise ConfigError(
                "sparsity=auto with max_drop=null: say how far the accuracy may fall, such as "
                "limits.max_accuracy_drop=0.002, which max_drop follows"
            )
        at_least("max_drop", self.max_drop, 0)
        at_least("rounds", self.rounds, 1)
        if self.fit.epochs == 0:
            raise ConfigError("sparsity=auto with fit.epochs=0: each round trains; set epochs")
        if self.schedule != "oneshot" or self.overrides:
            raise ConfigError(
                f"sparsity=auto with schedule={self.schedule}, overrides={self.overrides}: each "
                "round prunes at its start, by sensitivity; set schedule=oneshot and no overrides"
            )

    def _floor(self, size: int) -> int:
        return max(1, int(self.min_density * size))

    def _masks(self, latent: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        """The masks that the magnitudes ask for at `progress` of the fit."""
        sizes = {name: weight.numel() for name, weight in latent.items()}
        counts, pool, keep = self._targets(sizes, self._present, progress)
        if pool:
            shares = share([latent[n] for n in pool], keep, [self._floor(sizes[n]) for n in pool])
            counts |= zip(pool, shares, strict=True)
        return {name: largest(weight, counts[name]) for name, weight in latent.items()}

    def _finished(self, masked: Mapping[str, Masked]) -> bool:
        """Whether the masks have reached the final sparsity."""
        sizes = {name: found.mask.numel() for name, found in masked.items()}
        kept = {name: int(found.mask.sum()) for name, found in masked.items()}
        counts, pool, keep = self._targets(sizes, self._present, 1.0)
        return sum(kept[n] for n in pool) == keep and all(kept[n] == counts[n] for n in counts)


def _masked(model: nn.Module) -> dict[str, Masked]:
    """The weights that are masked, by name."""
    found = {name: compression(*places[0]) for name, places in weights(model).items()}
    return {name: masked for name, masked in found.items() if isinstance(masked, Masked)}


def _learnt(model: nn.Module) -> dict[str, Tensor]:
    """The learnt tensors behind the masked weights, by name."""
    places = weights(model)
    return {name: places[name][0].learnt.detach() for name in _masked(model)}


def _set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, masked in _masked(model).items():
        masked.mask.copy_(masks[name])


def _decide(masks: Mapping[str, Tensor], world: World) -> None:
    """Rank 0 decides: all ranks compute masks from the same bits, and then take rank 0's."""
    world.broadcast(masks.values())
