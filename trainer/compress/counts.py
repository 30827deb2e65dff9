"""How many parameters a model has, learns, and keeps."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from trainer.compress.select import ParameterRef, parameters, vectors, weights


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
    total, kept = _values(weights(model))
    others, others_kept = _values(vectors(model))
    behind = {id(places[0].trainable) for places in parameters(model).values()}
    rest = [p for p in model.parameters() if id(p) not in behind]  # scalars, and other types
    return Counts(
        parameters=total + others + sum(p.numel() for p in rest),
        learnable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        nonzero=kept + others_kept + sum(int(p.count_nonzero()) for p in rest),
        sparsity=1 - kept / total if total else 0.0,
    )


def _values(found: Mapping[str, list[ParameterRef]]) -> tuple[int, int]:
    """How many values, and how many of them are not zero."""
    values = [places[0].value for places in found.values()]
    return sum(v.numel() for v in values), sum(int(v.count_nonzero()) for v in values)
