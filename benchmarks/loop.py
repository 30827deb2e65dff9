"""Images per second of one worker: our loop, a plain PyTorch loop, Lightning, Accelerate.

    pip install -r benchmarks/requirements.txt
    python benchmarks/loop.py [--images 12800] [--repeats 9] [--nets LeNet-300-100 LeNet-5]
        [--quick]

One thread, batch 64, fused SGD; a repeat is an epoch over a slice of MNIST from the same weights.
Without Accelerate or Lightning, their rows are left out.
All take turns in one process, in an order that rotates; the first turn of each is not counted. The
table shows medians; a ratio is the median of the ratios within each turn.

    ours         the body of a run, trainer.worker.run.run_phases, in an InlineGroup: its own figure
                 for the train phase, from the making of the optimizer to the last step
    plain        the loop that one writes by hand: our data in our order, timed from and to the same
                 points, and no more than that; it must end with the same bits as ours
    Accelerate   its four lines in the plain loop, fed by a shuffling DataLoader (num_workers=0)
                 over a TensorDataset, normalised beforehand; the time is that of the epoch alone
    Lightning    a LightningModule, fed likewise; no logger, checkpoints, progress bar or summary;
                 the time between on_train_epoch_start and on_train_epoch_end
"""

import argparse
import datetime
import gc
import importlib.util
import logging
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib import metadata
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from trainer.cluster.inline import InlineGroup
from trainer.config import ClusterConfig, Config
from trainer.data.idx import mnist, normalise
from trainer.data.order import global_batches
from trainer.data.split import TensorSplit
from trainer.experiment import Experiment
from trainer.messages import PhaseEnded
from trainer.models import LeNet5, LeNet300
from trainer.worker.run import Start, run_phases

NETS: dict[str, Callable[[], nn.Module]] = {"LeNet-300-100": LeNet300, "LeNet-5": LeNet5}
BATCH, SEED = 64, 0
COMPARED = [name for name in ("accelerate", "lightning") if importlib.util.find_spec(name)]
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0005, "nesterov": True}
Turn = tuple[float, dict[str, Tensor]]  # images per second, the weights at the end


def ours(net: str, data: dict[str, Any], bf16: bool = False) -> Turn:
    fit = {"epochs": 1, "schedule": "constant"}
    cfg = Config(
        name="loop",
        model={"_target_": f"trainer.models.{NETS[net].__name__}"},
        data={"_target_": "trainer.data.mnist", "batch_size": BATCH, **data},
        optimizer={"_target_": "torch.optim.SGD", **SGD},
        phases={"train": {"_target_": "trainer.phases.Train", "fit": fit}},
        seed=SEED,
        precision="bf16" if bf16 else "fp32",
        channels_last=bf16,
    )
    group = InlineGroup(ClusterConfig(workers=1, backend="inline", device="cpu", threads=1))
    group.start()
    ended = next(
        m
        for m in group.run(run_phases, Experiment.from_config(cfg), Start(0))
        if isinstance(m, PhaseEnded)
    )
    return ended.record.images_per_second or 0.0, safetensors.torch.load(ended.weights)


def plain(net: str, split: TensorSplit, bf16: bool = False) -> Turn:
    memory_format = torch.channels_last if bf16 else torch.contiguous_format
    model = new(net).to(memory_format=memory_format)  # type: ignore[call-overload]
    started = time.perf_counter()
    optimizer = torch.optim.SGD(model.parameters(), fused=True, **SGD)
    order = global_batches(len(split), BATCH, SEED, 0)
    for inputs, targets in split.batches(order, 0):
        optimizer.zero_grad()
        inputs = inputs.contiguous(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            loss = F.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return len(split) / (time.perf_counter() - started), model.state_dict()


def with_accelerate(net: str, tensors: TensorDataset) -> Turn:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True)
    model = new(net)
    optimizer = torch.optim.SGD(model.parameters(), fused=True, **SGD)
    loader = DataLoader(tensors, BATCH, shuffle=True, num_workers=0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    started = time.perf_counter()
    for inputs, targets in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
    return len(tensors) / (time.perf_counter() - started), model.state_dict()


def with_lightning(net: str, tensors: TensorDataset) -> Turn:
    import lightning

    class Lit(lightning.LightningModule):
        """The least that Lightning needs, and a clock."""

        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net
            self.seconds = 0.0

        def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), fused=True, **SGD)

        def on_train_epoch_start(self) -> None:
            self.seconds -= time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.seconds += time.perf_counter()

    model = Lit(new(net))
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    options: dict[str, Any] = dict.fromkeys(off, False)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, **options)
    trainer.fit(model, DataLoader(tensors, BATCH, shuffle=True, num_workers=0))
    return len(tensors) / model.seconds, model.net.state_dict()


def new(net: str) -> nn.Module:
    """The net with the weights that every contestant starts from."""
    torch.manual_seed(SEED)
    return NETS[net]().train()


def race(net: str, images: int, repeats: int) -> None:
    """Print the rows of one net."""
    data: dict[str, Any] = {"train": images, "validation": 1, "test": 1}  # not timed, but needed
    split = mnist(SEED, **data).train
    assert isinstance(split, TensorSplit)
    tensors = TensorDataset(normalise(split.inputs), split.targets)
    contestants: dict[str, Callable[[], Turn]] = {
        "plain": partial(plain, net, split),
        "ours": partial(ours, net, data),
    }
    if "accelerate" in COMPARED:
        contestants["Accelerate"] = partial(with_accelerate, net, tensors)
    if "lightning" in COMPARED:
        contestants["Lightning"] = partial(with_lightning, net, tensors)
    if net == "LeNet-5":
        contestants["plain, bf16 + channels_last"] = partial(plain, net, split, bf16=True)
        contestants["ours, bf16 + channels_last"] = partial(ours, net, data, bf16=True)
    names = list(contestants)
    speeds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeats + 1):
        ends: dict[str, dict[str, Tensor]] = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            gc.collect()
            torch.set_num_threads(1)
            speed, ends[name] = contestants[name]()
            speeds[name] += [speed] * (number > 0)
        for kind in {name.partition(",")[2] for name in names}:
            a, b = (ends[f"{name},{kind}" if kind else name] for name in ("plain", "ours"))
            if not all(torch.equal(a[key], b[key]) for key in a):
                raise SystemExit(f"{net}{kind}: ours and plain did not do the same")
    for name, column in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(column, speeds["plain"], strict=True))
        print(
            f"| {net} | {name} | {statistics.median(column):,.0f} | {ratio:.3f} | "
            f"{min(column):,.0f} - {max(column):,.0f} | {repeats} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=12_800, help="per repeat")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.images, args.repeats, args.nets = 2 * BATCH, 1, args.nets[:1]
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", *COMPARED)]
    warnings.filterwarnings("ignore")  # Lightning wants more DataLoader workers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    print(
        f"# One worker's images/s, {datetime.date.today()}\n\n"
        f"{platform.machine()}, Python {platform.python_version()}, {', '.join(versions)}; "
        f"command: python {' '.join(sys.argv)}\n\n"
        "| net | loop | images/s | of plain | min - max | n |\n|" + " --- |" * 6,
        flush=True,
    )
    for net in args.nets:
        race(net, args.images, args.repeats)


if __name__ == "__main__":
    main()
