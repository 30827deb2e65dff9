"""Weight sharing: the weights of a layer take few values, and then those are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from trainer.compress.codebooks import INITS, MAX_CLUSTERS, Codebook, cluster
from trainer.compress.install import fold, install
from trainer.compress.parametrize import Shared
from trainer.compress.select import match_patterns, parameters, select_weights, vectors
from trainer.config import FitConfig, check_choice, check_min
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases.base import Phase
from trainer.phases.retrain import preserve


@dataclass
class Share(Phase):
    """Cluster the non-zero weights of each layer, give each the value of its cluster, and train
    those values: a codebook of a few numbers is all that a layer learns and sends.

    Zeros stay zero. Biases and norms are shared where `biases` says so; what is not shared trains
    along as it does in retrain, and without a fit only the clustering happens. A matrix of an LSTM
    or GRU with all its gates is one layer.
    """

    kind: ClassVar[str] = "share"
    makes: ClassVar[frozenset[str]] = frozenset({"sharing"})

    fit: FitConfig
    bits: int = 5  # of an index: 2^bits clusters per layer at most, 1 to 16
    overrides: dict[str, int] = field(default_factory=dict)  # bits by name pattern
    clusters: dict[str, int] = field(default_factory=dict)  # number by name pattern, before bits
    biases: int | None = None  # bits of an index into a bias or norm; null: they are not shared
    init: str = "linear"  # where k-means begins: linear | density | random | exact
    rate: float = 0.0  # price of a bit in variances of the weights; makes some clusters frequent
    include: list[str] = field(default_factory=lambda: ["*"])  # name patterns of weights to share
    exempt: list[str] = field(default_factory=list)  # name patterns of those not to share after all

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros", "sharing"})

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"quantization"})  # a mean of weights is on no grid

    def __post_init__(self) -> None:
        asked = {"bits": self.bits, "biases": self.biases} | _dotted("overrides", self.overrides)
        for key, bits in asked.items():
            if bits is not None and not 1 <= bits <= 16:
                raise ConfigError(f"{key}={bits}: it must be 1 to 16 bits")
        for key, number in _dotted("clusters", self.clusters).items():
            if not 1 <= number < 1 << 16:
                raise ConfigError(f"{key}={number}: it must be 1 to 65535 clusters")
        check_choice("init", self.init, tuple(INITS))
        check_min("rate", self.rate, 0)

    def check(self, model: nn.Module) -> None:
        self._numbers(model)

    def enter(self, model: nn.Module, world: World) -> None:
        places = parameters(model)
        shared = {}
        for name, number in self._numbers(model).items():
            weight = places[name][0].value.detach()
            book = cluster(weight, number, self.init, self.rate)
            shared[name] = Shared(weight, _decide(book, number, world))
        install(model, shared)
        preserve(model, world, self.keeps)

    def leave(self, model: nn.Module) -> None:
        fold(model)

    def _numbers(self, model: nn.Module) -> dict[str, int]:
        """Clusters of each tensor. Raises ConfigError for a pattern that matches no weight."""
        names = select_weights(model, self.include, self.exempt)
        bits = dict.fromkeys(names, self.bits) | match_patterns(self.overrides, names)
        numbers = {name: min(1 << b, MAX_CLUSTERS) for name, b in bits.items()}
        numbers |= match_patterns(self.clusters, names)
        if self.biases is not None:
            # In a shorter one the codebook would take more than it saves.
            most = min(1 << self.biases, MAX_CLUSTERS)
            long = (n for n, found in vectors(model).items() if found[0].value.numel() > 2 * most)
            numbers |= dict.fromkeys(long, most)
        return numbers


def _decide(book: Codebook, most: int, world: World) -> Codebook:
    """Rank 0 decides: all ranks cluster the same bits, and then take rank 0's codebook."""
    values = book.values.new_full([most], torch.nan)
    values[: len(book.values)] = book.values
    world.broadcast([values, book.codes])
    return Codebook(values[values.isfinite()], book.codes)


def _dotted(key: str, settings: Mapping[str, int]) -> dict[str, int]:
    return {f"{key}.{pattern}": value for pattern, value in settings.items()}
