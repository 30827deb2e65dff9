"""Training of what pruning left, and of nothing else."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from trainer.compress.install import fold, install
from trainer.compress.parametrize import Packed, compression
from trainer.compress.select import weights
from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.phases.base import Phase


@dataclass
class Retrain(Phase):
    """Train the survivors of pruning, biases and norms; every zero stays zero.

    The learnable parameter of a weight that has zeros is the vector of its other values, so that
    optimizer state, gradients, all-reduce and checkpoints shrink with the density. Weights without
    zeros stay dense.
    """

    kind: ClassVar[str] = "retrain"
    keeps: ClassVar[frozenset[str]] = frozenset({"zeros"})

    fit: FitConfig

    def enter(self, model: nn.Module, world: World) -> None:
        pack(model, world)

    def leave(self, model: nn.Module) -> None:
        fold(model)


def pack(model: nn.Module, world: World) -> None:
    """Let every plain weight that has zeros be learnt as the vector of its survivors.

    Rank 0 says which survive, so that the vectors of all ranks have one length.
    """
    plain = {
        name: places[0].value.detach()
        for name, places in weights(model).items()
        if compression(*places[0]) is None
    }
    masks = {name: weight != 0 for name, weight in plain.items()}
    world.broadcast(masks.values())
    install(
        model,
        {name: Packed(plain[name], mask) for name, mask in masks.items() if not mask.all()},
    )
