"""Training of the weights that pruning and sharing left, and of nothing else."""

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
    """Train the surviving weights, biases and norms; every zero stays zero.

    The trainable parameter of a weight that has zeros is the vector of its other values, so that
    optimizer state, gradients, all-reduce and checkpoints shrink with the density. A weight
    without zeros is trained as it is.

    Args:
        keep: Properties that are preserved: "zeros", and "sharing" (a weight with few distinct
            values is trained as its codebook, so that it keeps few).
    """

    kind: ClassVar[str] = "retrain"

    keep: list[str] = field(default_factory=lambda: ["zeros"])
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=1), kw_only=True)

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset(self.keep)

    def check_settings(self) -> None:
        for what in self.keep:
            check_choice("keep", what, ("zeros", "sharing"))

    def enter(self, model: nn.Module, world: World) -> None:
        preserve(model, world, self.keeps)

    def leave(self, model: nn.Module) -> None:
        fold(model)


def preserve(model: nn.Module, world: World, keep: Collection[str] = frozenset({"zeros"})) -> None:
    """Train each plain parameter only as far as earlier phases left it: see `surviving`."""
    install(model, surviving(model, world, keep))


def surviving(model: nn.Module, world: World, keep: Collection[str]) -> dict[str, Compression]:
    """How each plain parameter is trained if `keep` is preserved; dense ones are left out.

    Rank 0's weights decide, so that the trainable vectors have the same length on all ranks.

    Args:
        keep: "zeros": a weight with zeros is trained as the vector of its survivors; "sharing": a
            weight with few distinct values is trained as its codebook, which preserves its zeros
            as well, and so is a bias or norm.

    Returns:
        Compressions by the name of the parameter.
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
