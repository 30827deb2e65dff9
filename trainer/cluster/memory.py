"""Releases the memory of a worker function when it ends."""

import contextlib
import gc
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def memory_released(device: torch.device) -> Iterator[None]:
    """A context after which objects that the block allocated, and nobody uses, are freed.

    Models, optimizers and their hooks form reference cycles. Their tensors would stay allocated
    until Python's collector runs by itself, which depends on the number of objects and not on
    their size. Objects that existed before the block are exempt, because a search through those of
    torch and Ray takes 0.15 s. On CUDA the cached blocks are freed as well.
    """
    exempt = gc.get_freeze_count() == 0  # otherwise the program has frozen objects itself
    if exempt:
        gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        if exempt:
            gc.unfreeze()
        if device.type == "cuda":
            torch.cuda.empty_cache()
