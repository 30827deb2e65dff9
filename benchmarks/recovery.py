"""From `kill -9` of a worker to the next training step, beside Ray Train.

    pip install -r benchmarks/requirements.txt
    python benchmarks/recovery.py [--repeats 5] [--quick]

LeNet-5 on 6,000 digits, two CPU workers with one thread each, 32 digits per worker and step, fp32,
a checkpoint every 20 steps.

    ours        python -m trainer +experiment=smoke with a long first phase
    Ray Train   python benchmarks/recovery.py ray-train: TorchTrainer with FailureConfig (gloo, DDP,
                the same data, net and optimizer), on a Ray without dashboard

Both use an SGD that writes down when each of its steps is done, on a clock that all processes
share. When a checkpoint is on disk and each worker has done 100 steps, one of them is killed. The
time is from just before that until every worker that was started in its place has done a step: one
of ours, both of Ray Train's. The two take turns. Without Ray Train, it is left out.
"""

import argparse
import datetime
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
import torch
from startup import SGD, StampedSGD, end_leftovers, environment, has_ray_train

HERE = Path(__file__).resolve()
STEPS = 100  # of each worker before the fault
EVERY = 20  # steps between two checkpoints
LIMIT_S = 180.0  # for the start, and for the recovery


def ray_train() -> None:
    """The script that ours is compared with. Runs in a process of its own."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    folder = os.getcwd()
    ray.init(address="local", num_cpus=2, include_dashboard=False, _temp_dir=f"{folder}/ray")
    TorchTrainer(
        train_loop,
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(
            name="run",
            storage_path=f"{folder}/results",
            failure_config=FailureConfig(max_failures=3),
        ),
    ).fit()


def train_loop() -> None:
    """What each worker of Ray Train does: steps on its half of each batch, from a checkpoint on."""
    import ray.train.torch
    from ray.train import Checkpoint

    from trainer.data.idx import mnist
    from trainer.models import LeNet5

    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(0)
    data = mnist(seed=0, train=6000, validation=1000, test=1000).train
    model = ray.train.torch.prepare_model(LeNet5())
    optimizer = StampedSGD(model.parameters(), fused=True, **SGD)
    step = 0
    if found := ray.train.get_checkpoint():
        with found.as_directory() as folder:
            state = torch.load(Path(folder, "state.pt"), weights_only=True)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while True:
        order = torch.randperm(len(data)).split(64)
        for inputs, targets in data.batches([batch[rank::2] for batch in order], 0):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            step += 1
            if step % EVERY:
                continue
            if rank:
                ray.train.report({"step": step})
                continue
            with tempfile.TemporaryDirectory() as folder:
                state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**state, "step": step}, Path(folder, "state.pt"))
                ray.train.report({"step": step}, checkpoint=Checkpoint.from_directory(folder))


def our_command() -> list[str]:
    return [
        *(sys.executable, "-m", "trainer", "+experiment=smoke"),
        *("precision=fp32", "channels_last=false", "hydra.run.dir=run", "cluster.device=cpu"),
        *(f"optimizer.{key}={value}" for key, value in SGD.items()),
        "optimizer._target_=startup.StampedSGD",
        *("phases.train.fit.epochs=10000", "data.validation=64"),
        *(f"checkpoint.every_steps={EVERY}", "checkpoint.every_seconds=null"),
    ]


def measure(command: list[str], kept: str, started_anew: int, steps: int) -> float:
    """Run a command and kill one of its workers. Seconds until training goes on.

    Args:
        kept: pattern of the checkpoints that it writes.
        started_anew: how many workers start in place of the dead one.
        steps: of each worker before the fault.
    """
    folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))  # short: Ray's sockets
    stamps = folder / "stamps"
    stamps.mkdir()
    try:
        with (folder / "output").open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment(stamps) | {"TMPDIR": str(folder)},  # the reaper is killed as well
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + LIMIT_S

        def wait() -> None:
            time.sleep(0.01)
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command} failed:\n{(folder / 'output').read_text()[-5000:]}")

        while sorted(map(len, _read(stamps).values())) < [steps] * 2 or not any(folder.glob(kept)):
            wait()
        before = set(_read(stamps))
        deadline, killed = time.monotonic() + LIMIT_S, time.monotonic()
        os.kill(max(before), 9)
        while True:
            wait()
            first = [times[0] for pid, times in _read(stamps).items() if pid not in before]
            if len(first) == started_anew:
                return max(first) - killed
    finally:
        process.kill()
        end_leftovers(str(stamps))
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _read(stamps: Path) -> dict[int, list[float]]:
    """The time stamps of each worker, by its process id, without a line that is half written."""
    whole = {int(f.name): f.read_text().rpartition("\n")[0].split() for f in stamps.iterdir()}
    return {pid: [*map(float, lines)] for pid, lines in whole.items() if lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="?", choices=["compare", "ray-train"], default="compare")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.repeats = 1
    if args.what == "ray-train":
        return ray_train()
    print(
        f"# From kill -9 of a worker to the next step, {datetime.date.today()}\n\n"
        f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        f"torch {torch.__version__}, ray {ray.__version__}; command: python {' '.join(sys.argv)}\n"
    )
    theirs = [sys.executable, str(HERE), "ray-train"]
    ways = {"ours": (our_command(), "run/checkpoints/*-step-*", 1)}
    if has_ray_train() and not args.quick:
        ways["Ray Train"] = (theirs, "results/run/checkpoint_*", 2)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            times[name].append(measure(*way, EVERY if args.quick else STEPS))
            print(f"{name}: {times[name][-1]:.2f} s", file=sys.stderr, flush=True)
    print("| | next step, s | min - max | n |\n| --- | --- | --- | --- |")
    for name, row in times.items():
        print(
            f"| {name} | {statistics.median(row):.2f} | {min(row):.2f} - {max(row):.2f} | "
            f"{len(row)} |"
        )
    if len(times) < 2:
        return print("| Ray Train was left out | | | |")
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    print(f"| ours / Ray Train, median of pairs | {ratio:.2f} | | |")


if __name__ == "__main__":
    main()
