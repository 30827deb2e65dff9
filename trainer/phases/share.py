"""Weight sharing: the weights of a layer take few values, and then those values are trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.compress.codebooks import INITS, MAX_CLUSTERS, Codebook, cluster
from trainer.compress.install import fold, install
from trainer.compress.parametrize import Shared
from trainer.compress.select import match_patterns, parameters, select_weights, vectors
from trainer.config import check_choice, check_min
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases.auto import AUTO, MAX_BITS, check_auto, limit_for, search_bits
from trainer.phases.base import Evaluate, Phase
from trainer.phases.retrain import preserve


@dataclass
class Share(Phase):
    """Cluster the non-zero weights of each layer and train one value per cluster.

    Each layer then learns and sends a codebook of a few numbers. Zeros stay zero. Parameters that
    are not shared are trained as in `Retrain`. With `epochs=0` the weights are only clustered. A
    matrix of an LSTM or GRU with all its gates is one layer. Han, Mao & Dally, Deep Compression,
    ICLR 2016, arXiv:1510.00149.

    Args:
        bits: Bits of an index: at most 2^bits values per layer, 1 to 16. "auto": the fewest bits of
            each layer, 1 to 8, with which the first metric on validation data is within `max_drop`
            before training (trainer.phases.auto).
        overrides: Bits by name pattern.
        clusters: Number of values by name pattern, 1 to 65535; takes precedence over bits.
        biases: Bits of an index into a bias or norm; None: they are not shared.
        init: Where k-means starts: linear, density, random or exact.
        rate: Price of a bit of the index, in variances of the weights. A positive price makes some
            clusters frequent, and the coded file smaller.
        include: Name patterns of the weights to share.
        exempt: Name patterns of weights that are excluded.
        max_drop: With `bits="auto"`: how much worse than the dense model's the first metric may be,
            as for `AutoPrune`. None: the phase's share of the limit of the experiment.
    """

    kind: ClassVar[str] = "share"
    makes: ClassVar[frozenset[str]] = frozenset({"sharing"})

    bits: int | str = 5
    overrides: dict[str, int] = field(default_factory=dict)
    clusters: dict[str, int] = field(default_factory=dict)
    biases: int | None = None
    init: str = "linear"
    rate: float = 0.0
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)
    max_drop: Any = None

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        super().__post_init__(epochs, lr)
        self._chosen: dict[str, int] = {}  # bits by name, if they are searched for

    @property
    def searches(self) -> bool:
        return self.bits == AUTO

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros", "sharing"})

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"quantization"})  # a mean of weights is not on their grid

    def check_settings(self) -> None:
        check_auto("bits", self.bits, self.max_drop)
        bits = None if isinstance(self.bits, str) else self.bits
        widths: dict[str, int | None] = {"bits": bits, "biases": self.biases}
        widths |= _dotted("overrides", self.overrides)
        for key, bits in widths.items():
            if bits is not None and not 1 <= bits <= 16:
                raise ConfigError(f"{key}={bits}: it must be 1 to 16 bits")
        for key, number in _dotted("clusters", self.clusters).items():
            if not 1 <= number < 1 << 16:
                raise ConfigError(f"{key}={number}: it must be 1 to 65535 clusters")
        check_choice("init", self.init, tuple(INITS))
        check_min("rate", self.rate, 0)

    def check_model(self, model: nn.Module) -> None:
        self._cluster_counts(model)

    def search(
        self, model: nn.Module, world: World, evaluate: Evaluate, dense: nn.Module | None
    ) -> list[str]:
        if not self.searches:
            return []
        limit = limit_for(model, evaluate, dense, self.max_drop)
        numbers, places = self._cluster_counts(model), parameters(model)
        chosen = select_weights(model, self.include, self.exempt)
        fixed = match_patterns(self.overrides, chosen).keys() | match_patterns(
            self.clusters, chosen
        )
        exact = {name: places[name][0].value.detach().clone() for name in numbers}

        def put(name: str, number: int | None) -> None:
            values = exact[name] if number is None else self._shared(exact[name], number)
            places[name][0].value.detach().copy_(values)

        def measure(bits: Mapping[str, int]) -> Metrics:
            for name, number in bits.items():
                put(name, 1 << number)
            metrics = evaluate(model)
            for name in bits:
                put(name, None)
            return metrics

        for name in numbers:
            if name in fixed or name not in chosen:
                put(name, numbers[name])
        sizes = {name: exact[name].numel() for name in chosen if name not in fixed}
        self._chosen, line = search_bits(sizes, 1, measure, limit)
        for name in numbers:
            put(name, None)
        return [line]

    def state(self) -> Mapping[str, Any]:
        return {"bits": self._chosen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._chosen = dict(state.get("bits", {}))

    def enter(self, model: nn.Module, world: World) -> None:
        places = parameters(model)
        shared = {}
        for name, number in self._cluster_counts(model).items():
            weight = places[name][0].value.detach()
            book = cluster(weight, number, self.init, self.rate)
            shared[name] = Shared(weight, _from_rank_0(book, number, world))
        install(model, shared)
        preserve(model, world, self.keeps)

    def leave(self, model: nn.Module) -> None:
        fold(model)

    def _shared(self, weight: Tensor, number: int) -> Tensor:
        """A weight with at most `number` values."""
        book = cluster(weight, number, self.init, self.rate)
        return torch.cat((book.values.new_zeros(1), book.values))[book.codes.long()]

    def _cluster_counts(self, model: nn.Module) -> dict[str, int]:
        """Clusters of each tensor. Raises ConfigError for a pattern that matches no weight."""
        names = select_weights(model, self.include, self.exempt)
        default = MAX_BITS if isinstance(self.bits, str) else self.bits
        bits = dict.fromkeys(names, default) | self._chosen
        bits |= match_patterns(self.overrides, names)
        numbers = {name: min(1 << b, MAX_CLUSTERS) for name, b in bits.items()}
        numbers |= match_patterns(self.clusters, names)
        if self.biases is not None:
            # In a shorter vector the codebook would take more bytes than it saves.
            largest = min(1 << self.biases, MAX_CLUSTERS)
            long = (
                name
                for name, found in vectors(model).items()
                if found[0].value.numel() > 2 * largest
            )
            numbers |= dict.fromkeys(long, largest)
        return numbers


def _from_rank_0(book: Codebook, size: int, world: World) -> Codebook:
    """Rank 0's codebook on all ranks: they cluster the same weights, but rank 0 decides.

    Args:
        size: Number of values that a codebook has at most.
    """
    values = book.values.new_full([size], torch.nan)
    values[: len(book.values)] = book.values
    world.broadcast([values, book.codes])
    return Codebook(values[values.isfinite()], book.codes)


def _dotted(key: str, settings: Mapping[str, int]) -> dict[str, int]:
    return {f"{key}.{pattern}": value for pattern, value in settings.items()}
