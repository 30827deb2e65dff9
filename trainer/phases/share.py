"""Weight sharing: the weights of a layer take few values, and then those are trained."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from trainer.compress.codebooks import INITS, MOST, Codebook, cluster
from trainer.compress.install import fold, install
from trainer.compress.parametrize import Shared
from trainer.compress.select import choose, match
from trainer.config import FitConfig, at_least, one_of
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases.base import Phase
from trainer.phases.retrain import preserve


@dataclass
class Share(Phase):
    """Cluster the non-zero weights of each layer, give each the value of its cluster, and train
    those values: a codebook of a few numbers is all that a layer learns and sends.

    Zeros stay zero. Biases, norms and exempt weights train along as they do in retrain; without a
    fit only the clustering happens. A matrix of an LSTM or GRU with all its gates is one layer.
    """

    kind: ClassVar[str] = "share"
    makes: ClassVar[frozenset[str]] = frozenset({"sharing"})

    fit: FitConfig
    bits: int = 5  # of an index: 2^bits clusters per layer at most, 1 to 16
    overrides: dict[str, int] = field(default_factory=dict)  # bits by name pattern
    clusters: dict[str, int] = field(default_factory=dict)  # number by name pattern, before bits
    init: str = "linear"  # where k-means begins: linear | density | random | exact
    rate: float = 0.0  # price of a bit in variances of the weights; makes some clusters frequent
    include: list[str] = field(default_factory=lambda: ["*"])  # name patterns of weights to share
    exempt: list[str] = field(default_factory=list)  # name patterns of those not to share after all

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros", "sharing"})

    def __post_init__(self) -> None:
        for key, bits in {"bits": self.bits, **_dotted("overrides", self.overrides)}.items():
            if not 1 <= bits <= 16:
                raise ConfigError(f"{key}={bits}: it must be 1 to 16 bits")
        for key, number in _dotted("clusters", self.clusters).items():
            if not 1 <= number < 1 << 16:
                raise ConfigError(f"{key}={number}: it must be 1 to 65535 clusters")
        one_of("init", self.init, tuple(INITS))
        at_least("rate", self.rate, 0)

    def check(self, model: nn.Module) -> None:
        self._numbers(choose(model, self.include, self.exempt))

    def enter(self, model: nn.Module, world: World) -> None:
        places = choose(model, self.include, self.exempt)
        shared = {}
        for name, number in self._numbers(places).items():
            weight = places[name][0].value.detach()
            book = cluster(weight, number, self.init, self.rate)
            shared[name] = Shared(weight, _decide(book, number, world))
        install(model, shared)
        preserve(model, world, self.keeps)

    def leave(self, model: nn.Module) -> None:
        fold(model)

    def _numbers(self, names: Iterable[str]) -> dict[str, int]:
        """Clusters of each weight. Raises ConfigError for a pattern that matches none."""
        bits = dict.fromkeys(names, self.bits) | match(self.overrides, names)
        return {name: min(1 << b, MOST) for name, b in bits.items()} | match(self.clusters, names)


def _decide(book: Codebook, most: int, world: World) -> Codebook:
    """Rank 0 decides: all ranks cluster the same bits, and then take rank 0's codebook."""
    values = book.values.new_full([most], torch.nan)
    values[: len(book.values)] = book.values
    world.broadcast([values, book.codes])
    return Codebook(values[values.isfinite()], book.codes)


def _dotted(key: str, settings: Mapping[str, int]) -> dict[str, int]:
    return {f"{key}.{pattern}": value for pattern, value in settings.items()}
