"""How many parameters a model has, learns, and keeps."""

from dataclasses import dataclass

import torch
from torch import nn

from trainer.compress.select import weights


@dataclass(frozen=True)
class Counts:
    """Numbers of single values; what is tied counts once."""

    parameters: int  # of the dense model, biases and norms included
    learnable: int  # that the optimizer sees: inside a phase perhaps the survivors only
    nonzero: int  # of the parameters
    sparsity: float  # fraction of zeros among the compressible weights, in [0, 1]


@torch.no_grad()
def counts(model: nn.Module) -> Counts:
    """Count, inside or outside a phase: a compressed weight counts as the dense one it makes."""
    total = kept = 0
    behind: set[int] = set()
    for places in weights(model).values():
        value = places[0].value
        total += value.numel()
        kept += int(value.count_nonzero())
        behind.add(id(places[0].learnt))
    others = [p for p in model.parameters() if id(p) not in behind]
    return Counts(
        parameters=total + sum(p.numel() for p in others),
        learnable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        nonzero=kept + sum(int(p.count_nonzero()) for p in others),
        sparsity=1 - kept / total if total else 0.0,
    )
