"""Objects that all phases of a run share; moves model and batches to the device."""

import gc
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import AllReduceConfig
from trainer.data.tree import map_tensors
from trainer.engine.optim import OptimizerSpec
from trainer.engine.precision import Precision
from trainer.engine.reducer import Reducer
from trainer.engine.world import World
from trainer.tasks import Classification, Task

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of dimensions


@dataclass(frozen=True)
class Runtime:
    """The workers, their arithmetic, and the settings that are the same in every phase."""

    world: World
    precision: str  # fp32, bf16 or fp16
    allreduce: AllReduceConfig
    optimizer: OptimizerSpec
    batch_size: int  # global: over all workers
    seed: int
    channels_last: bool = False
    sync_batchnorm: bool = False
    task: Task = field(default_factory=Classification)
    compile: Any = False  # false, true, or arguments of torch.compile
    recompute: Sequence[str] = ()  # patterns of modules with gradient checkpointing

    @cached_property
    def mixed_precision(self) -> Precision:
        """Autocast and loss scaling; the loss scale that a phase ends with starts the next one."""
        return Precision(self.precision, self.world.device)

    def release_memory(self) -> None:
        """On CUDA, free what an earlier phase allocated and nothing uses any more.

        Optimizers and hooks form reference cycles, which Python's collector finds whenever it runs.
        """
        if self.world.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()

    def reducer(self, parameters: Iterable[nn.Parameter], extras: int) -> Reducer:
        """What averages the gradients of `parameters` and so many other values over the workers."""
        return Reducer(parameters, self.world, self.allreduce, extras)

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model, in place, to the device and the memory format of this run."""
        model.to(device=self.world.device)
        self.task.to(self.world.device)
        if self.channels_last:
            for tensor in (*model.parameters(), *model.buffers()):
                if tensor.ndim in _CHANNELS_LAST and tensor.is_floating_point():
                    tensor.data = tensor.data.to(memory_format=_CHANNELS_LAST[tensor.ndim])
        return model

    def place_batch(self, inputs: Any, targets: Tensor) -> tuple[Any, Tensor]:
        """Move a batch to the device; inputs with 4 or 5 dimensions get the model's format."""
        return map_tensors(self._place, inputs), self._move(targets)

    def _place(self, tensor: Tensor) -> Tensor:
        tensor = self._move(tensor)
        if self.channels_last and tensor.ndim in _CHANNELS_LAST:
            return tensor.contiguous(memory_format=_CHANNELS_LAST[tensor.ndim])
        return tensor

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.world.device, non_blocking=True)
