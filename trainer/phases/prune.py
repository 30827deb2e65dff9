"""Pruning by magnitude or by inputs, at once, or along a ramp during training."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.compress.install import fold, install
from trainer.compress.layer_inputs import is_matrix
from trainer.compress.masks import cubic_sparsity, kept_counts
from trainer.compress.parametrize import Masked, compression
from trainer.compress.saliency import (
    MAGNITUDE,
    SALIENCIES,
    SPARSEGPT,
    Target,
    magnitude_mask,
    prune_by_inputs,
)
from trainer.compress.select import ParameterRef, match_patterns, select_weights, weights
from trainer.config import check_choice, check_min
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases.auto import AUTO
from trainer.phases.base import Phase
from trainer.phases.retrain import preserve


@dataclass
class Prune(Phase):
    """Set the weights of smallest magnitude, or of smallest effect on the outputs, to zero.

    With `schedule="oneshot"` the weights are pruned at the start, and the fit trains the survivors
    alone, as `Retrain` does. With `schedule="cubic"` the sparsity rises during training, from the
    present one to the final one between `begin` and `end` of the fit
    (trainer.compress.masks.cubic_sparsity). Until then all weights are trained, and a pruned weight
    that grows returns with the next mask; after `end` the masks are fixed.

    The number of weights kept is exact: round((1 - sparsity) * weights), at least one, per layer or
    over all layers. A matrix of an LSTM or GRU with all its gates is one layer. Pruning never
    lowers the sparsity, and exempt weights keep the zeros that they have. Han et al., NIPS 2015,
    arXiv:1506.02626.

    Without training, `saliency="wanda"` or "sparsegpt" keeps more of the model: both take the
    inputs of each layer into account, from training samples whose labels are not used
    (trainer.compress.saliency). They hold for Linear and convolutions; other weights, such as
    embeddings, are pruned by magnitude.

    Args:
        sparsity: Fraction of the weights that become zero, in [0, 1). "2:4": of every 4 consecutive
            inputs of an output 2 stay, likewise other numbers; the inputs of each layer must be a
            multiple of the second. "auto" is a shorthand for `AutoPrune`, which takes fit,
            max_drop, rounds, min_density, include and exempt.
        scope: "layer": each layer reaches the sparsity. "global": one threshold for all layers.
        min_density: Smallest fraction of its weights that any layer keeps, in [0, 1].
        overrides: Sparsity by name pattern. These layers are pruned on their own in both scopes.
        schedule: "oneshot" or "cubic".
        begin: Start of the cubic ramp, as a fraction of the steps.
        end: End of the cubic ramp, as a fraction of the steps.
        interval: Number of steps between two masks of the cubic ramp.
        saliency: Which weights become zero: those of smallest "magnitude"; "wanda": of smallest
            magnitude times norm of their input, the same number for each output; "sparsegpt": of
            smallest effect on the outputs after the other weights were changed to compensate for
            it, as is done. The last two need samples, oneshot and scope layer.
        samples: Number of training samples whose inputs the saliency takes into account.
        include: Name patterns of the weights to prune.
        exempt: Name patterns of weights that are excluded.
        max_drop: See `AutoPrune`.
        rounds: See `AutoPrune`.
    """

    kind: ClassVar[str] = "prune"
    makes: ClassVar[frozenset[str]] = frozenset({"zeros"})

    sparsity: int | float | str = 0.9
    scope: str = "layer"
    min_density: float = 0.01
    overrides: dict[str, float] = field(default_factory=dict)
    schedule: str = "oneshot"
    begin: float = 0.0
    end: float = 0.75
    interval: int = 10
    saliency: str = MAGNITUDE
    samples: int = 0
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)
    max_drop: Any = None
    rounds: int = 15

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        super().__post_init__(epochs, lr)
        self._present: dict[str, int] = {}  # weights that were not zero at the start, by layer
        self._inputs: Sequence[Any] = ()

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros"})

    @property
    def destroys(self) -> frozenset[str]:
        changes = self.saliency == SPARSEGPT  # the weights that are not pruned
        return frozenset({"sharing", "quantization"} if changes else ())

    @property
    def ramps(self) -> bool:
        return self.schedule == "cubic"

    def check_settings(self) -> None:
        check_choice("scope", self.scope, ("layer", "global"))
        check_choice("schedule", self.schedule, ("oneshot", "cubic"))
        check_min_density(self.min_density)
        sparsities = {f"overrides.{pattern}": value for pattern, value in self.overrides.items()}
        if not isinstance(self.sparsity, str):
            sparsities["sparsity"] = float(self.sparsity)
        elif self.sparsity != AUTO:
            self._check_pattern(self.sparsity)
        for key, value in sparsities.items():
            if not 0 <= value < 1:
                quoted = '; write a pattern in quotes: "2:4"' if value > 1 else ""  # YAML: 124
                raise ConfigError(f"{key}={value}: it must be at least 0 and below 1{quoted}")
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
        self._check_saliency()

    def _check_saliency(self) -> None:
        check_choice("saliency", self.saliency, SALIENCIES)
        check_min("samples", self.samples, 0)
        if self.saliency == MAGNITUDE:
            if self.samples:
                raise ConfigError(
                    f"samples={self.samples} with saliency=magnitude, which looks at no inputs: "
                    "set saliency=wanda or sparsegpt, or samples=0"
                )
            return
        if not self.samples:
            raise ConfigError(
                f"saliency={self.saliency} with samples=0: it needs inputs; set samples=128"
            )
        if (self.schedule, self.scope) != ("oneshot", "layer") or self.sparsity == AUTO:
            raise ConfigError(
                f"saliency={self.saliency} with schedule={self.schedule}, scope={self.scope}, "
                f"sparsity={self.sparsity}: it prunes once, and compares weights within a layer; "
                "set schedule=oneshot, scope=layer and a number or a pattern as sparsity"
            )

    def _check_pattern(self, sparsity: str) -> None:
        if (pattern := _parse_pattern(sparsity)) is None:
            raise ConfigError(
                f"sparsity={sparsity!r}: it must be a number in [0, 1), auto, or a pattern such as "
                '"2:4"'
            )
        if not 1 <= pattern[0] < pattern[1]:
            raise ConfigError(f"sparsity={sparsity}: of n:m weights, 1 <= n < m must stay")
        if (self.schedule, self.scope, self.overrides) != ("oneshot", "layer", {}):
            raise ConfigError(
                f"sparsity={sparsity} with schedule={self.schedule}, scope={self.scope}, overrides="
                f"{self.overrides}: all layers get the pattern at once; set schedule=oneshot, "
                "scope=layer and no overrides"
            )

    def check_model(self, model: nn.Module) -> None:
        if isinstance(self.sparsity, str):
            pattern = _parse_pattern(self.sparsity)
            assert pattern is not None  # expand() has replaced sparsity=auto
            unsuitable = [
                name
                for name, places in select_weights(model, self.include, self.exempt).items()
                if places[0].value.ndim < 2 or places[0].value.shape[1] % pattern[1]
            ]
            if unsuitable:
                raise ConfigError(
                    f"sparsity={self.sparsity}: the inputs of {', '.join(unsuitable)} are no "
                    f"multiple of {pattern[1]}; set exempt=[{', '.join(unsuitable)}]"
                )
            return
        sizes = {
            name: places[0].value.numel()
            for name, places in select_weights(model, self.include, self.exempt).items()
        }
        _, pool, keep = self._targets(sizes, sizes, 1.0)
        if sum(min_kept(sizes[name], self.min_density) for name in pool) > keep:
            raise ConfigError(
                f"sparsity={self.sparsity} keeps {keep} of these weights, fewer than "
                f"min_density={self.min_density} of each layer, at least one, needs: lower one"
            )

    def notices(self, model: nn.Module) -> list[str]:
        if self.saliency == MAGNITUDE:
            return []
        chosen = select_weights(model, self.include, self.exempt)
        others = [name for name, places in chosen.items() if not is_matrix(places)]
        return [f"pruned by magnitude: {', '.join(others)}"] if others else []

    def observe(self, model: nn.Module, world: World, inputs: Sequence[Any]) -> None:
        self._inputs = inputs

    def enter(self, model: nn.Module, world: World) -> None:
        chosen = select_weights(model, self.include, self.exempt)
        values = {name: places[0].value.detach() for name, places in chosen.items()}
        if self.schedule == "cubic":
            survivors = {name: weight != 0 for name, weight in values.items()}
            world.broadcast(survivors.values())
            self._present = {name: int(mask.sum()) for name, mask in survivors.items()}
            install(model, {name: Masked(values[name], mask) for name, mask in survivors.items()})
        else:
            self._present = {name: weight.numel() for name, weight in values.items()}
            if self.saliency == MAGNITUDE:
                prune_weights(values, self._masks(values, 1.0), world)
            else:
                targets = self._targets_at(values, 1.0)
                prune_by_inputs(model, chosen, targets, self._inputs, self.saliency)
                world.broadcast(values.values())
                self._inputs = ()
        if self.fit.epochs:
            preserve(model, world)  # weights that are not masked keep the zeros they have

    def after_step(self, model: nn.Module, world: World, step: int, total: int) -> None:
        if self.schedule == "oneshot":
            return
        last = max(1, math.ceil(self.end * total - 1e-9))
        if step == last or (self.begin * total <= step < last and step % self.interval == 0):
            masks = self._masks(_trained(model), 1.0 if step == last else step / total)
            world.broadcast(masks.values())
            _set_masks(model, masks)

    def leave(self, model: nn.Module) -> None:
        masked = _masked(model)
        if masked:
            masks = self._masks(_trained(model), 1.0)
            if _total(masks) < _total({name: found.mask for name, found in masked.items()}):
                _set_masks(model, masks)  # max_steps ended the training before the ramp did
        fold(model)

    def _masks(self, latent: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        """The masks at `progress` of the fit, in [0, 1], by magnitude."""
        targets = self._targets_at(latent, progress)
        return {name: magnitude_mask(weight, targets[name]) for name, weight in latent.items()}

    def _targets_at(self, latent: Mapping[str, Tensor], progress: float) -> Mapping[str, Target]:
        """What stays of each weight at `progress` of the fit, in [0, 1]."""
        if isinstance(self.sparsity, str) and (pattern := _parse_pattern(self.sparsity)):
            return dict.fromkeys(latent, pattern)
        sizes = {name: weight.numel() for name, weight in latent.items()}
        counts, pool, keep = self._targets(sizes, self._present, progress)
        if pool:
            # A layer that was sparser before cannot keep as much as min_density asks for.
            floors = [min(min_kept(sizes[n], self.min_density), self._present[n]) for n in pool]
            counts |= zip(pool, kept_counts([latent[n] for n in pool], keep, floors), strict=True)
        return counts

    def _targets(
        self, sizes: Mapping[str, int], present: Mapping[str, int], progress: float
    ) -> tuple[dict[str, int], list[str], int]:
        """The number of weights kept at `progress`.

        Args:
            sizes: Number of weights of each layer.
            present: Number of weights of each layer that were not zero when the phase began.

        Returns:
            Weights kept by each layer that is pruned on its own; the names of the layers that share
            one threshold; the number of weights that these keep together.
        """
        assert not isinstance(self.sparsity, str)  # expand() has replaced sparsity=auto
        alone = match_patterns(self.overrides, sizes)
        if self.scope == "layer":
            alone = dict.fromkeys(sizes, float(self.sparsity)) | alone
        pool = [name for name in sizes if name not in alone]
        counts = {n: self._kept(sizes[n], present[n], s, progress) for n, s in alone.items()}
        if not pool:
            return counts, pool, 0
        size, there = sum(sizes[n] for n in pool), sum(present[n] for n in pool)
        return counts, pool, self._kept(size, there, float(self.sparsity), progress)

    def _kept(self, size: int, present: int, sparsity: float, progress: float) -> int:
        """The number of `size` weights kept at `progress`."""
        if self.schedule == "cubic":
            initial = 1 - present / size
            final = max(initial, sparsity)
            sparsity = cubic_sparsity(progress, initial, final, self.begin, self.end)
        return max(1, round((1 - sparsity) * size))


def _parse_pattern(sparsity: str) -> tuple[int, int] | None:
    """The numbers of a pattern such as "2:4"; None: it is none."""
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", sparsity)
    return found and (int(found[1]), int(found[2]))


def check_min_density(min_density: float) -> None:
    """Raise ConfigError for a density outside [0, 1]."""
    if not 0 <= min_density <= 1:
        raise ConfigError(f"min_density={min_density}: it must be between 0 and 1")


def min_kept(size: int, min_density: float) -> int:
    """The smallest number of its `size` weights that a layer keeps."""
    return max(1, int(min_density * size))


def prune_weights(values: Mapping[str, Tensor], masks: Mapping[str, Tensor], world: World) -> None:
    """Set the weights outside the masks to zero, in place. Rank 0's masks are used on all ranks."""
    world.broadcast(masks.values())
    for name, mask in masks.items():
        values[name].masked_fill_(~mask, 0)


def _masked(model: nn.Module) -> dict[str, Masked]:
    """The masks that are installed, by the name of the weight."""
    found = {name: compression(*places[0]) for name, places in weights(model).items()}
    return {name: masked for name, masked in found.items() if isinstance(masked, Masked)}


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors behind the masked weights, by the name of the weight."""
    places: dict[str, list[ParameterRef]] = weights(model)
    return {name: places[name][0].trainable.detach() for name in _masked(model)}


def _set_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    for name, masked in _masked(model).items():
        masked.mask.copy_(masks[name])


def _total(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())
