"""Finds the sample that may be the reason for a loss that is NaN or infinite."""

from collections.abc import Iterable

import torch
from torch import Tensor

from trainer.data.checked import sample_name
from trainer.data.split import Split, unwrapped
from trainer.data.tree import tensors
from trainer.engine.world import World
from trainer.errors import RunError


def check_samples(
    world: World, split: Split, name: str, order: Iterable[Tensor], epoch: int | None
) -> str:
    """Read samples once more and raise an error if an input holds NaN or infinity.

    A target may be NaN or infinite if the loss leaves it out, so it is only named.

    A collective call: all ranks raise the same error. For use after a loss that is not finite;
    looking at every input beforehand would cost a pass over the memory of each batch.

    Args:
        world: The ranks that took part.
        split: What the samples were read from; not while it is being read.
        name: Of the split, for the message: train, validation or test.
        order: This rank's samples, as for `Split.batches`.
        epoch: As for `Split.batches`.

    Returns:
        A sentence on a target that is NaN or infinite; "" if there is none.

    Raises:
        RunError: Names the split and the sample.
    """
    samples = [index for indices in order for index in indices.split(1)]
    found = torch.zeros(2, world.size, dtype=torch.int64)  # a sample's index + 1, or 0
    # One by one, since batches need not have a row for each sample; without the partners of mixed
    # samples, which are in the batches of a wrapper.
    for index, sample in zip(samples, unwrapped(split).batches(samples, epoch), strict=True):
        for part, values in zip(found, sample, strict=True):
            broken = any(
                (tensor.is_floating_point() or tensor.is_complex())
                and not bool(tensor.isfinite().all())
                for tensor in tensors(values)
            )
            if broken and not part[world.rank]:
                part[world.rank] = index + 1
        if found[0, world.rank]:
            break
        world.heartbeat.beat()
    world.all_reduce(found)
    inputs, targets = (part[part > 0].tolist() for part in found)
    if inputs:
        sample = sample_name(split, inputs[0] - 1)
        raise RunError(
            f"data: the input of {name} {sample} is NaN or infinite; correct or remove it"
        )
    if not targets:
        return ""
    return f"the target of {name} {sample_name(split, targets[0] - 1)} is NaN or infinite"
