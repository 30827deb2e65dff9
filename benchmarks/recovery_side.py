"""What recovery.py compares with: the same training, started by Ray Train or by torchrun.

    python benchmarks/recovery_side.py ray-train FOLDER          # on a node of a Ray cluster
    torchrun ... benchmarks/recovery_side.py torchrun FOLDER     # on each host

Both are elastic, and keep a checkpoint in FOLDER, which all hosts share. Settings that are not the
default, all in favour of the two: Ray Train looks for further hosts every 5 s (default: 60 s), and
the exchange of gradients fails after 60 s (default: 30 min), as our cluster.hang_timeout_s. Ray
Train's get_preemption_info, for a checkpoint at a notice, is left out: it is a barrier per step.
"""

import datetime
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from startup import StampedSGD
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from trainer.data.idx import mnist
from trainer.models import LeNet5

WORKERS = (1, 3)
BATCH = 96  # digits per step, of all workers
EVERY = 20  # steps between two checkpoints
SGD: dict[str, Any] = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0005, "nesterov": True}
TIMEOUT_S = 60
FILE = "state.pt"


def train(state: dict[str, Any] | None, keep: Callable[[dict[str, Any] | None], None]) -> None:
    """Train until the process is ended.

    Args:
        state: to continue from.
        keep: is given the state every EVERY steps, on the first worker; None on the others.
    """
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = mnist(seed=0, train=6000, validation=1000, test=1000).train
    model = DistributedDataParallel(LeNet5())
    optimizer = StampedSGD(model.parameters(), fused=True, **SGD)
    if state:
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    while True:
        order = torch.randperm(len(data)).split(BATCH)
        for inputs, targets in data.batches([batch[rank::size] for batch in order], 0):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            if optimizer.steps % EVERY == 0:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                keep(None if rank else state)


def load(file: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def torchrun_worker(folder: Path) -> None:
    def keep(state: dict[str, Any] | None) -> None:
        if state is not None:
            torch.save(state, folder / "new.pt")
            os.replace(folder / "new.pt", folder / FILE)

    distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    train(load(folder / FILE) if (folder / FILE).exists() else None, keep)


def ray_train_worker() -> None:
    import ray.train

    def keep(state: dict[str, Any] | None) -> None:
        if state is None:
            return ray.train.report({})
        with tempfile.TemporaryDirectory() as new:
            torch.save(state, Path(new, FILE))
            ray.train.report({}, checkpoint=ray.train.Checkpoint.from_directory(new))

    state = None
    if found := ray.train.get_checkpoint():
        with found.as_directory() as folder:
            state = load(Path(folder, FILE))
    train(state, keep)


def ray_train(folder: Path) -> None:
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(address="auto")
    TorchTrainer(
        ray_train_worker,
        torch_config=TorchConfig(backend="gloo", timeout_s=TIMEOUT_S),
        scaling_config=ScalingConfig(
            num_workers=WORKERS,
            resources_per_worker={"CPU": 1},
            elastic_resize_monitor_interval_s=5,
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=10),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    ).fit()


if __name__ == "__main__":
    {"ray-train": ray_train, "torchrun": torchrun_worker}[sys.argv[1]](Path(sys.argv[2]))
