"""Training of what pruning and sharing left, and of nothing else."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from torch import nn

from trainer.compress.codebooks import codebook_of
from trainer.compress.install import fold, install
from trainer.compress.parametrize import Compression, Packed, Shared, compression
from trainer.compress.select import parameters, vectors
from trainer.config import FitConfig, check_choice
from trainer.engine.world import World
from trainer.phases.base import Phase


@dataclass
class Retrain(Phase):
    """Train the survivors of pruning, biases and norms; every zero stays zero.

    The learnable parameter of a weight that has zeros is the vector of its other values, so that
    optimizer state, gradients, all-reduce and checkpoints shrink with the density. Weights without
    zeros stay dense. With `keep: [zeros, sharing]` a weight that has few distinct values keeps them
    few: its codebook is what is learnt.
    """

    kind: ClassVar[str] = "retrain"

    fit: FitConfig
    keep: list[str] = field(default_factory=lambda: ["zeros"])  # what stays: zeros, sharing

    def __post_init__(self) -> None:
        for what in self.keep:
            check_choice("keep", what, ("zeros", "sharing"))

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset(self.keep)

    def enter(self, model: nn.Module, world: World) -> None:
        preserve(model, world, self.keeps)

    def leave(self, model: nn.Module) -> None:
        fold(model)


def preserve(model: nn.Module, world: World, keep: Collection[str] = frozenset({"zeros"})) -> None:
    """Let every plain parameter be learnt as what earlier phases left of it: see `surviving`."""
    install(model, surviving(model, world, keep))


def surviving(model: nn.Module, world: World, keep: Collection[str]) -> dict[str, Compression]:
    """By name, what each plain parameter is to be learnt as; one that stays dense is left out.

    Rank 0 says which survive and which are equal, so that the vectors of all ranks have one length.

    Args:
        keep: "zeros": a weight with zeros is learnt as the vector of its survivors; "sharing": one
            with few distinct values is learnt as its codebook, which keeps its zeros as well, and
            so is a bias or norm.
    """
    made: dict[str, Compression] = {}
    vector = vectors(model)
    for name, places in parameters(model).items():
        if compression(*places[0]) is not None:
            continue
        weight = places[0].value.detach()
        world.broadcast([weight])
        is_vector = name in vector
        book = codebook_of(weight, any_repeat=not is_vector) if "sharing" in keep else None
        mask = weight != 0
        if book is not None and (not is_vector or len(book.values) > 1):
            made[name] = Shared(weight, book)
        elif "zeros" in keep and not is_vector and not mask.all():
            made[name] = Packed(weight, mask)
    return made
