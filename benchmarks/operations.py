"""Operations of PyTorch in an optimizer step of each phase, and values that the host reads.

    python benchmarks/operations.py [--precision fp32] [--quick]

On a GPU, the host launches each operation, and it waits for what was launched before whenever it
reads a value, such as a loss. Both are counted here on a CPU, with the loss read a step late, as on
a single GPU: one of the values is then of the step before, which does not wait. ResNet-50, images
of 64 pixels, batch 4, SGD with momentum; a step is all from one result of `trainer.engine.loop.fit`
to the next, the phase's own work after a step included. Views are not counted.
"""

import argparse
import collections
import datetime
import platform
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import AllReduceConfig, FitConfig
from trainer.data.split import TensorSplit
from trainer.engine import loop
from trainer.engine.objective import Penalized, Supervised
from trainer.engine.optim import parse_optimizer
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.models import LeNet5, resnet50
from trainer.phases import EntropyPenalty, Phase, Prune, Quantize, Retrain, Share, Train
from trainer.tasks import Classification

BATCH = 4
STEPS = 4  # the last one is counted; the optimizer has its state by then
READ = "aten::_local_scalar_dense"
WORLD = World.single(torch.device("cpu"))


class Counted(TorchDispatchMode):
    """Counts operations by name; views are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.found[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def runtime(precision: str) -> Runtime:
    return Runtime(
        world=WORLD,
        precision=precision,
        allreduce=AllReduceConfig(),
        optimizer=parse_optimizer({"_target_": "torch.optim.SGD", "lr": 1e-4, "momentum": 0.9}),
        batch_size=BATCH,
        seed=0,
        channels_last=False,
        task=Classification(),
    )


def counted(model: nn.Module, split: TensorSplit, phase: Phase, precision: str) -> Counted:
    """The operations of the last step of a phase."""
    phase.enter(model, WORLD)
    run = runtime(precision)
    objective = Penalized(Supervised(run.task), phase.penalty)
    steps = loop.fit(model, split, FitConfig(epochs=1), run, objective=objective)
    for _ in range(STEPS - 1):
        step = next(steps)
        phase.after_step(model, WORLD, step.step, step.total)
    with Counted() as counter:
        step = next(steps)
        phase.after_step(model, WORLD, step.step, step.total)
    steps.close()
    return counter


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--quick", action="store_true", help="LeNet-5: does it run?")
    args = parser.parse_args()
    build: Callable[[], nn.Module] = LeNet5 if args.quick else resnet50
    size = (1, 28, 28) if args.quick else (3, 64, 64)
    settings = FitConfig(epochs=1)
    phases: dict[str, tuple[bool, Phase]] = {  # whether 90% of the weights are zero, and the phase
        "train": (False, Train(fit=settings)),
        "retrain, 90% zeros": (True, Retrain(fit=settings)),
        "share, 5 bits": (True, Share(5, fit=settings)),
        "share, 8 bits": (True, Share(8, fit=settings)),
        "quantize": (False, Quantize(fit=settings)),
        "entropy": (False, EntropyPenalty(vectors=True, fit=settings)),
    }
    print(
        f"# Operations of a step, {datetime.date.today()}\n\n{platform.machine()}, torch "
        f"{torch.__version__}, {args.precision}\n\n| phase | operations | values read by the host |"
        "\n| --- | --- | --- |"
    )
    for name, (sparse, phase) in phases.items():
        torch.manual_seed(0)
        split = TensorSplit(
            torch.randn(BATCH * STEPS * 2, *size), torch.arange(BATCH * STEPS * 2) % 10
        )
        model = build()
        if sparse:
            Prune(0.9, fit=FitConfig(epochs=0)).enter(model, WORLD)
        with mock.patch.object(loop, "reads_late", return_value=True):
            found = counted(model, split, phase, args.precision).found
        print(f"| {name} | {sum(found.values()):,} | {found[READ]} |", flush=True)


if __name__ == "__main__":
    main()
