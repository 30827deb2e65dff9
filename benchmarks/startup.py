"""From the command to the first training step, beside Ray Train; and from one phase to the next.

    pip install -r benchmarks/requirements.txt
    python benchmarks/startup.py [--repeats 5] [--borders 10] [--quick]

LeNet-5 on 6,000 digits, two CPU workers with one thread each, 32 digits per worker and step, fp32.

    ours        python -m trainer +experiment=smoke, cut to two steps per phase
    Ray Train   python benchmarks/startup.py ray-train: the least TorchTrainer script (gloo, DDP,
                the same data, net and optimizer), on a Ray without dashboard

Both use an SGD that writes down when each of its steps is done, on a clock that all processes
share. `first step`: from just before the command's process is made until the slower worker's first
step is done: interpreter, imports, Ray, workers, rendezvous, data, model, the step. `whole process`
goes on until it has ended; ours also prunes, retrains, evaluates and writes its results in it. The
two take turns; the first pair is not counted.

`phase border`, ours: from the last step of a phase until the first of the next, less the median
step: the old phase's end, evaluation on 64 images, the checkpoint on its way to the driver, the new
phase's start with its optimizer and buckets. Smoke without sharing, and with more retrain phases.

Without Ray Train, it is left out of the comparison.
"""

import argparse
import contextlib
import datetime
import importlib.util
import os
import platform
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

HERE = Path(__file__).resolve()
STAMPS = "STARTUP_STAMPS"  # environment: the folder of the time stamps; also marks our processes
LIMIT_S = 300.0
PROCESS = secrets.token_hex(4)  # a host that starts again uses the same process ids again
SGD: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0005, "nesterov": True}


class StampedSGD(torch.optim.SGD):
    """SGD whose every step leaves its time and number in a file of the worker's."""

    @property
    def steps(self) -> int:
        """How many have been done, also by others before a state was loaded."""
        return int(self.param_groups[0].get("steps", 0))

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        self.param_groups[0]["steps"] = self.steps + 1
        if len(self.param_groups[0]["params"]) > 2:  # else ours only tries whether it can be used
            name = f"{socket.gethostname()}-{os.getpid()}-{PROCESS}"
            with open(f"{os.environ[STAMPS]}/{name}", "a", encoding="utf-8") as file:
                file.write(f"{time.monotonic()} {self.steps}\n")
        return result


def read_stamps(folder: Path) -> dict[str, list[tuple[float, int]]]:
    """Time and number of each step, by worker (HOST-PID-...), without a line half written."""
    found = {}
    for file in folder.iterdir():
        lines = file.read_text().rpartition("\n")[0].splitlines()
        found[file.name] = [(float(a), int(b)) for a, b in map(str.split, lines)]
    return {worker: steps for worker, steps in found.items() if steps}


def ray_train() -> None:
    """The script that ours is compared with. Runs in a process of its own."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = os.getcwd()
    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=f"{folder}/ray")
    TorchTrainer(
        train_loop,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(storage_path=f"{folder}/results"),
    ).fit()


def train_loop() -> None:
    """What each worker of Ray Train does: two steps on its half of the batches."""
    import ray.train.torch

    from trainer.data.idx import mnist
    from trainer.models import LeNet5

    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    data = mnist(seed=0, train=6000, validation=1000, test=1000).train
    model = ray.train.torch.prepare_model(LeNet5())
    optimizer = StampedSGD(model.parameters(), fused=True, **SGD)
    order = torch.randperm(len(data)).split(64)[:2]
    for inputs, targets in data.batches([batch[rank::2] for batch in order], 0):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def our_command(phases: int) -> list[str]:
    """Smoke with `phases` more retrain phases."""
    more = [f"again{number}" for number in range(phases)]
    return [
        *(sys.executable, "-m", "trainer", "+experiment=smoke"),
        *("precision=fp32", "channels_last=false", "hydra.run.dir=run", "cluster.device=cpu"),
        *(f"optimizer.{key}={value}" for key, value in SGD.items()),
        "optimizer._target_=startup.StampedSGD",
        *(f"+phase@phases.{name}=retrain" for name in more),
        *(f"phases.{name}.fit.max_steps=2" for name in ("train", "retrain", *more)),
        *(["data.validation=64"] if phases else []),
        # Retraining after sharing would have to keep the values.
        *(["phases.share.enabled=false", "artifact.make=false"] if phases else []),
    ]


def measure(command: list[str]) -> tuple[list[float], float]:
    """Run a command. Seconds until each step was done by the slower worker, and until the end."""
    folder = tempfile.mkdtemp(prefix="startup-")
    stamps = Path(folder, "stamps")
    stamps.mkdir()
    try:
        with Path(folder, "output").open("w+") as output:
            started = time.monotonic()
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(stamps),
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            code = process.wait(LIMIT_S)
            ended = time.monotonic()
            columns = [[at for at, _ in steps] for steps in read_stamps(stamps).values()]
            if code or len(columns) != 2:
                output.seek(0)
                raise SystemExit(f"{' '.join(command)}: failed:\n{output.read()}")
    finally:
        end_leftovers(str(stamps))
        shutil.rmtree(folder, ignore_errors=True)
    return [max(pair) - started for pair in zip(*columns, strict=True)], ended - started


def environment(stamps: Path) -> dict[str, str]:
    """Of a command whose workers leave their time stamps in a folder."""
    given = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return given | {
        STAMPS: str(stamps),
        "PYTHONPATH": f"{HERE.parent.parent}{os.pathsep}{HERE.parent}",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # ours sets its own
        "RAY_worker_niceness": "0",  # as ours
    }


def end_leftovers(mark: str) -> None:
    """Kill every process that was started, however indirectly, with our mark."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.environ().get(STAMPS) == mark:
                process.kill()


def has_ray_train() -> bool:
    """Whether Ray Train can be imported: it needs packages that Ray itself does not."""
    return all(importlib.util.find_spec(name) for name in ("pandas", "pyarrow", "requests"))


def compare(repeats: int) -> None:
    """Ours and theirs in turn."""
    commands = {"ours": our_command(0)}
    if has_ray_train():
        commands["Ray Train"] = [sys.executable, str(HERE), "ray-train"]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for number in range(repeats + 1):
        for name, command in commands.items():
            steps, until_end = measure(command)
            if number:
                times[name].append((steps[0], until_end))
    print("| | first step, s | min - max | whole process, s | n |\n| --- | --- | --- | --- | --- |")
    for name, rows in times.items():
        first, end = zip(*rows, strict=True)
        print(
            f"| {name} | {statistics.median(first):.2f} | {min(first):.2f} - {max(first):.2f} | "
            f"{statistics.median(end):.2f} | {len(rows)} |"
        )
    if len(times) < 2:
        return print("| Ray Train is not installed | | | | |\n")
    pairs = list(zip(*times.values(), strict=True))
    ratios = (statistics.median(a[i] / b[i] for a, b in pairs) for i in (0, 1))
    print("| ours / Ray Train, median of pairs | {:.2f} | | {:.2f} | |\n".format(*ratios))


def borders(phases: int) -> None:
    steps, _ = measure(our_command(phases))
    gaps = [after - before for before, after in pairwise(steps)]
    inside, between = gaps[::2], gaps[1::2]  # two steps per phase
    step = statistics.median(inside)
    pruned, *plain = (gap - step for gap in between)
    print(
        "| phase border | s | min - max | n |\n| --- | --- | --- | --- |\n"
        f"| retrain to retrain | {statistics.median(plain):.3f} | {min(plain):.3f} - "
        f"{max(plain):.3f} | {len(plain)} |\n"
        f"| train, one-shot prune, retrain: two borders | {pruned:.3f} | | 1 |\n\n"
        f"the median step: {step:.4f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["compare", "ray-train"], default="compare")
    parser.add_argument("--repeats", type=int, default=5, help="of the comparison")
    parser.add_argument("--borders", type=int, default=10, help="between retrain phases")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    if args.what == "ray-train":
        return ray_train()
    print(
        f"# From the command to the first step, {datetime.date.today()}\n\n"
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}; command: python {' '.join(sys.argv)}\n",
    )
    if args.quick:
        return borders(2)
    compare(args.repeats)
    borders(args.borders)


if __name__ == "__main__":
    main()
