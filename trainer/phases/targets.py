"""How many weights each layer keeps: as the settings say; trainer.phases.auto searches it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from trainer.compress.masks import cubic_sparsity, kept_counts
from trainer.compress.select import ParameterRef, match_patterns
from trainer.engine.evaluate import Metrics
from trainer.errors import ConfigError
from trainer.messages import RoundRecord
from trainer.phases.base import Measure


class Targets:
    """How far Prune goes, and in how many rounds; the base is for targets known from the start."""

    @property
    def most_rounds(self) -> int:
        """How many rounds there are at most."""
        return 1

    def check(self, sizes: Mapping[str, int]) -> None:
        """Refuse what does not fit layers of so many weights. Raises ConfigError."""

    def plan(
        self,
        model: nn.Module,
        layers: Mapping[str, list[ParameterRef]],
        measure: Measure,
        dense: nn.Module | None,
    ) -> None:
        """Decide what the next round keeps. Arguments as in Phase.plan, and `layers`: the weights
        to prune, by name."""

    def begin(self, model: nn.Module) -> None:
        """Put the model where the present round begins."""

    def keep(
        self, latent: Mapping[str, Tensor], present: Mapping[str, int], progress: float
    ) -> dict[str, int]:
        """How many of the largest weights of each layer are kept.

        Args:
            latent: the values that compete, by name.
            present: how many weights of each layer were not zero when the phase began.
            progress: of the fit, in [0, 1].
        """
        raise NotImplementedError

    def judge(self, model: nn.Module, metrics: Metrics) -> RoundRecord | None:
        """Say what a round came to, as Phase.judge does."""
        return None

    def state(self) -> Mapping[str, Any]:
        """What a checkpoint must keep."""
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""


@dataclass
class Given(Targets):
    """Targets that follow from the settings of Prune, whose names these are."""

    sparsity: float
    scope: str
    min_density: float
    overrides: Mapping[str, float]
    ramp: tuple[float, float] | None  # cubic: begin and end

    def check(self, sizes: Mapping[str, int]) -> None:
        _, pool, keep = self._shares(sizes, sizes, 1.0)
        if sum(floor(sizes[name], self.min_density) for name in pool) > keep:
            raise ConfigError(
                f"sparsity={self.sparsity} keeps {keep} of these weights, fewer than "
                f"min_density={self.min_density} of each layer, at least one, needs: lower one"
            )

    def keep(
        self, latent: Mapping[str, Tensor], present: Mapping[str, int], progress: float
    ) -> dict[str, int]:
        sizes = {name: weight.numel() for name, weight in latent.items()}
        counts, pool, keep = self._shares(sizes, present, progress)
        if pool:
            # A layer that was sparser before has no more to keep.
            floors = [min(floor(sizes[n], self.min_density), present[n]) for n in pool]
            counts |= zip(pool, kept_counts([latent[n] for n in pool], keep, floors), strict=True)
        return counts

    def _shares(
        self, sizes: Mapping[str, int], present: Mapping[str, int], progress: float
    ) -> tuple[dict[str, int], list[str], int]:
        """How many weights to keep at `progress`: of each layer that stands alone, and then of the
        layers that share a threshold, all together."""
        alone = match_patterns(self.overrides, sizes)
        if self.scope == "layer":
            alone = dict.fromkeys(sizes, self.sparsity) | alone
        pool = [name for name in sizes if name not in alone]
        size, there = sum(sizes[n] for n in pool), sum(present[n] for n in pool)
        counts = {n: self._count(sizes[n], present[n], s, progress) for n, s in alone.items()}
        return counts, pool, self._count(size, there, self.sparsity, progress) if pool else 0

    def _count(self, size: int, present: int, sparsity: float, progress: float) -> int:
        if self.ramp:
            initial = 1 - present / size
            sparsity = cubic_sparsity(progress, initial, max(initial, sparsity), *self.ramp)
        return max(1, round((1 - sparsity) * size))


def floor(size: int, min_density: float) -> int:
    """How many of `size` weights a layer keeps at least."""
    return max(1, int(min_density * size))
