"""Pruning by what weights contribute to the outputs of their layer, without training."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compress.layer_inputs import ObservedLayer, evaluation, observe_layers, with_inputs
from trainer.compress.masks import largest, largest_in_groups, largest_in_rows
from trainer.compress.second_order import prune_second_order
from trainer.compress.select import ParameterRef

MAGNITUDE, WANDA, SPARSEGPT = SALIENCIES = ("magnitude", "wanda", "sparsegpt")

Target = int | tuple[int, int]
"""How many weights of a layer stay; or (n, m): n of each m consecutive inputs of an output."""


@torch.no_grad()
def prune_by_inputs(
    model: nn.Module,
    places: Mapping[str, Sequence[ParameterRef]],
    targets: Mapping[str, Target],
    inputs: Sequence[Any],
    saliency: str,
) -> None:
    """Set weights to zero, in place, layer by layer in the order in which the model calls them.

    Each layer is pruned by the inputs that it gets when the layers before it are pruned. Weights
    that do not multiply the inputs of one layer (`is_matrix`), or whose layer is never called, are
    pruned by magnitude.

    Args:
        model: With plain weights; its mode is restored afterwards.
        places: Where the model uses each weight to be pruned.
        targets: What stays of each weight.
        inputs: Batches [n, ...] of the model's inputs, on its device; several in a tuple or
            mapping.
        saliency: "wanda": |w| times the norm of its input; every output keeps as many weights, up
            to one (Sun et al., ICLR 2024, arXiv:2306.11695). "sparsegpt": by the error that remains
            after the other weights of the output were changed to compensate for it
            (`prune_second_order`).
    """
    with evaluation(model):
        observed = observe_layers(model, places, inputs)
        for name, refs in places.items():
            if name not in observed:
                weight = refs[0].value
                weight.masked_fill_(~magnitude_mask(weight, targets[name]), 0)
        patterns = {target[1] for target in targets.values() if isinstance(target, tuple)}
        together = max(patterns, default=1)  # all layers have the same pattern
        second_order = saliency == SPARSEGPT
        for layers in with_inputs(
            model, observed, inputs, products=second_order, together=together
        ):
            for name, layer in layers.items():
                prune = _prune_second_order if second_order else _prune_by_norms
                prune(layer, places[name][0].value, targets[name])


def magnitude_mask(score: Tensor, target: Target) -> Tensor:
    """Which weights stay by |score|: bool, in the shape of the weight."""
    return (
        largest_in_groups(score, *target) if isinstance(target, tuple) else largest(score, target)
    )


def _prune_by_norms(layer: ObservedLayer, weight: Tensor, target: Target) -> None:
    assert layer.statistics is not None
    norms = layer.statistics.squares.sqrt()  # [groups, columns]
    rows = weight.reshape(len(norms), -1, norms.shape[1])
    score = (rows.abs() * norms.unsqueeze(1).float()).reshape(weight.shape)
    if isinstance(target, tuple):
        mask = largest_in_groups(score, *target)
    else:
        mask = largest_in_rows(score.flatten(1), target).view(weight.shape)
    weight.masked_fill_(~mask, 0)


def _prune_second_order(layer: ObservedLayer, weight: Tensor, target: Target) -> None:
    assert layer.statistics is not None
    size, kernel = weight.numel(), weight[0, 0].numel()
    done = 0  # weights in earlier blocks

    def prune(block: Tensor, gram: Tensor, group: int) -> Tensor:
        nonlocal done
        block = block.float()
        if isinstance(target, tuple):
            return prune_second_order(block, gram, 0, target, kernel)
        end = done + block.numel()
        keep = target * end // size - target * done // size
        done = end
        return prune_second_order(block, gram, keep, None)

    layer.statistics.replace(weight, prune)
