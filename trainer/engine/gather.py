"""Gather tensors of different shapes from all workers."""

import torch
from torch import Tensor

from trainer.engine.world import World

_MAX_DIMS = 16
_TYPES = (
    torch.uint8, torch.int8, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.bool,
)  # fmt: skip


def all_gather(world: World, tensor: Tensor) -> list[Tensor]:
    """The tensors of all ranks, in the order of ranks, on every rank. A collective call.

    Args:
        world: The ranks.
        tensor: Of this rank. Shapes may differ between ranks; types may not, except that of an
            empty tensor, which becomes that of the others.
    """
    if world.size == 1:
        return [tensor]
    header = torch.zeros(world.size, 2 + _MAX_DIMS, dtype=torch.int64, device=world.device)
    kind = 1 + _TYPES.index(tensor.dtype) if tensor.numel() else 0
    own = torch.tensor([kind, tensor.ndim, *tensor.shape], device=world.device)
    header[world.rank, : len(own)] = own
    world.all_reduce(header)
    rows = header.tolist()
    sizes = [torch.Size(row[2 : 2 + row[1]]) for row in rows]
    counts = [size.numel() for size in sizes]
    kind = max(row[0] for row in rows)
    dtype = _TYPES[kind - 1] if kind else tensor.dtype
    # Adding zeros changes no value.
    carried = torch.uint8 if dtype == torch.bool else dtype
    values = torch.zeros(sum(counts), dtype=carried, device=world.device)
    parts = values.split(counts)
    parts[world.rank].copy_(tensor.reshape(-1))
    if len(values):
        world.all_reduce(values)
    return [part.view(size).to(dtype).clone() for part, size in zip(parts, sizes, strict=True)]
