"""The order of hidden units and channels, which a network does not depend on.

Where the fullest units of a layer come first, the coder of the file learns from the rows and
columns before a position how full it is, and empty units lie together at the end. What the order of
n units could say, log2(n!) bits, is not stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compress.dependencies import Unit
from trainer.compress.slicing import find_units


def own_units(model: nn.Module, inputs: Any) -> list[Unit]:
    """The units of a model, but for those inside attention, which is rebuilt to find them.

    Args:
        model: With plain weights.
        inputs: As for `find_units`.

    Raises:
        ConfigError: The model cannot be copied.
    """
    tensors = _tensors(model)
    _, units, _ = find_units(model, inputs)
    return [unit for unit in units if all(part.name in tensors for part in unit.parts)]


@torch.no_grad()
def sort_units(model: nn.Module, units: Sequence[Unit]) -> None:
    """Sort the units of each layer by how many of their values are not zero, the fullest first.

    In place. The model computes the same but for the order in which floats are added.

    Args:
        model: With plain weights.
        units: Of `own_units`. Layers of which a unit has parts
            of another size than the others stay as they are.
    """
    tensors = _tensors(model)
    layers: dict[frozenset[tuple[str, int]], list[Unit]] = {}
    for unit in units:
        layers.setdefault(unit.dimensions, []).append(unit)
    for found in layers.values():
        if len({tuple(len(part.positions) for part in unit.parts) for unit in found}) > 1:
            continue
        fullness = [_nonzero(unit, tensors) for unit in found]
        order = sorted(range(len(found)), key=lambda place: -fullness[place])
        for number, part in enumerate(found[0].parts):
            tensor = tensors[part.name]
            places = [torch.tensor(unit.parts[number].positions) for unit in found]
            index = torch.arange(tensor.shape[part.dim])
            index[torch.cat(places)] = torch.cat([places[place] for place in order])
            tensor.copy_(tensor.index_select(part.dim, index.to(tensor.device)))


def _nonzero(unit: Unit, tensors: dict[str, Tensor]) -> int:
    """Values other than zero in the slices of a unit."""
    slices = (
        tensors[part.name].index_select(
            part.dim, tensors[part.name].new_tensor(part.positions, dtype=torch.long)
        )
        for part in unit.parts
    )
    return sum(int(values.count_nonzero()) for values in slices)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))
