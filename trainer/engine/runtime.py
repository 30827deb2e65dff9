"""What stays the same over all phases of a run, and how a batch gets to the model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.config import AllReduceConfig
from trainer.engine.optim import OptimizerSpec
from trainer.engine.precision import Precision
from trainer.engine.world import World


@dataclass(frozen=True)
class Runtime:
    """The world that trains, its arithmetic, and the settings that every phase shares."""

    world: World
    precision: str  # fp32, bf16 or fp16
    allreduce: AllReduceConfig
    optimizer: OptimizerSpec
    batch_size: int  # global: over all workers
    seed: int
    channels_last: bool = False

    def place(self, model: nn.Module) -> nn.Module:
        """Move a model to the device and memory format of this run."""
        memory_format = torch.channels_last if self.channels_last else torch.preserve_format
        return model.to(device=self.world.device, memory_format=memory_format)  # type: ignore[call-overload, no-any-return]

    def arithmetic(self) -> Precision:
        """Autocast and a fresh loss scaler, in this run's precision."""
        return Precision(self.precision, self.world.device)

    def place_batch(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Move a batch to the device; 4-D inputs also to the memory format of the model."""
        inputs = inputs.to(self.world.device, non_blocking=True)
        if self.channels_last and inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return inputs, targets.to(self.world.device, non_blocking=True)
