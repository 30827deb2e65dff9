"""The order of samples: the global batches of an epoch, and how workers share them.

Pure functions of (n, batch size, seed, epoch): global batches do not depend on the number of
workers.
"""

import torch
from torch import Tensor

from trainer.data.hashing import mix


def permutation(n: int, seed: int, epoch: int, shuffled: bool = True) -> Tensor:
    """A permutation of range(n), int64 [n], drawn from a generator seeded with mix(seed, epoch).

    With `shuffled=False`, as for streams, 0 to n - 1.
    """
    if not shuffled:
        return torch.arange(n)
    generator = torch.Generator().manual_seed(mix(seed, epoch))
    return torch.randperm(n, generator=generator)


def global_batches(
    n: int, batch_size: int, seed: int, epoch: int, shuffled: bool = True
) -> list[Tensor]:
    """The epoch's permutation in slices of `batch_size`; the last one may be shorter.

    Takes the arguments of `permutation`. Raises ValueError if there are no samples or the batch
    size is not positive.
    """
    if n < 1:
        raise ValueError("there are no training samples: the data set is empty")
    if batch_size < 1:
        raise ValueError(f"data.batch_size={batch_size}: it must be at least 1")
    return list(torch.split(permutation(n, seed, epoch, shuffled), batch_size))


def shard(batch: Tensor, rank: int, world_size: int) -> Tensor:
    """The part of a batch's indices that worker `rank` of `world_size` computes.

    Contiguous and in rank order. Sizes may differ: the first len(batch) % world_size ranks
    get one sample more, and ranks get none if there are not enough.
    """
    each, extra = divmod(len(batch), world_size)
    start = rank * each + min(rank, extra)
    return batch[start : start + each + (rank < extra)]
