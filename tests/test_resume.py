"""Runs that survive: stopped, killed, damaged, and in the end the same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer.__main__ import main
from trainer.cluster.inline import InlineGroup
from trainer.config import ClusterConfig, Config, typed
from trainer.engine.world import World
from trainer.messages import Checkpoint, PhaseEnded, RunStopped
from trainer.run import Start, experiment

FIT = {"epochs": 2, "schedule": "cosine"}
PHASES = {
    "train": {"_target_": "trainer.phases.Train", "fit": FIT},
    "prune": {
        "_target_": "trainer.phases.Prune",
        "sparsity": 0.8,
        "schedule": "cubic",
        "interval": 2,
        "fit": FIT,
    },
    "retrain": {
        "_target_": "trainer.phases.Retrain",
        "fit": {**FIT, "accumulate": 2, "clip": 1.0, "distill": {"weight": 0.5}},
    },
    "share": {"_target_": "trainer.phases.Share", "bits": 2, "fit": {**FIT, "lr": 0.001}},
}
STEPS = 8  # per phase: two epochs of 50 samples in batches of 16


def config(**changes):
    settings = {
        "name": "test",
        "seed": 3,
        "channels_last": True,
        "model": {
            "_target_": "trainer.models.ConvNet", "depth": 2, "kernel_size": 3, "width": 4,
        },
        "data": {
            "_target_": "trainer.data.mnist.mnist",
            "batch_size": 16,
            "train": 50,
            "validation": 20,
            "test": 20,
            "shift": 1,
        },
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.05, "momentum": 0.9},
        "phases": PHASES,
        "cluster": {"workers": 1, "backend": "inline", "threads": 1},
        "checkpoint": {"every_seconds": None},
    }  # fmt: skip
    return typed(Config, {**settings, **changes})


def run(cfg, start=None, stop_at=None):
    """(weights, validation, place to go on from) of a run that is asked to stop at a step."""
    world = World.single(torch.device("cpu"))
    if stop_at is not None and stop_at[1] == 0:
        world.stop.set()
    start = start or Start(0)
    weights, found, validation = start.weights, None, None
    phase = start.phase
    for message in experiment(world, cfg, start):
        if isinstance(message, PhaseEnded):
            weights, phase = message.weights, message.index + 1
            validation = (message.record.accuracy, message.record.loss)
        if isinstance(message, Checkpoint):
            found = message
        if isinstance(message, RunStopped):
            within = found.content if found and found.phase == phase else None
            return weights, None, Start(phase, weights, within)
        if stop_at and world.pulse.place >= (stop_at[0], stop_at[1]):
            world.stop.set()
    return weights, validation, None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"precision": "fp16"},
        {"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01}},
        {"model": {
            "_target_": "trainer.models.ResNetCifar", "depth": 8, "in_channels": 1,
        }, "phases": {"train": PHASES["train"]}},
    ],
    ids=["sgd", "fp16", "adam", "batch-norm"],
)  # fmt: skip
def test_stopped_anywhere_and_resumed_it_ends_in_the_same_bits(changes):
    cfg = config(**changes, checkpoint={"every_steps": 1, "every_seconds": None})
    undisturbed, test, rest = run(cfg)
    assert rest is None
    chance = random.Random(0)
    for _ in range(3):
        place = (chance.randrange(len(cfg.phases)), chance.randrange(1, STEPS - 1))
        _, nothing, start = run(cfg, stop_at=place)
        assert nothing is None
        weights, again, rest = run(cfg, start)
        assert rest is None
        assert again == test
        assert weights == undisturbed, f"stopped at {place}"


def test_a_run_stopped_many_times_ends_in_the_same_bits():
    cfg = config()
    undisturbed, test, _ = run(cfg)
    start, stops = None, 0
    for phase in range(len(PHASES)):
        for step in (1, 3, 5):
            _, _, start = run(cfg, start, (phase, step))
            stops += start is not None
    weights, again, _ = run(cfg, start)
    assert stops == 3 * len(PHASES)
    assert (weights, again) == (undisturbed, test)


def test_the_group_passes_a_stop_on():
    group = InlineGroup(ClusterConfig(workers=1, backend="inline", threads=1))
    group.start()
    group.stop_asked.set()
    messages = list(group.run(experiment, config(), Start(0)))
    assert isinstance(messages[-1], RunStopped)
    group.stop()


ARGUMENTS = [
    "+experiment=smoke",
    "cluster=inline",
    "cluster.threads=1",
    "precision=fp32",
    "data.train=1600",
    "data.validation=100",
    "data.test=100",
    "checkpoint.every_steps=3",
]


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """A folder with an undisturbed run, to compare others with."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    assert main([*ARGUMENTS, "hydra.run.dir=undisturbed"]) == 0
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def same_end(one, other):
    """Whether two runs have the same weights, test figures and training curves."""
    a, b = (load_file(Path(folder) / "model.safetensors") for folder in (one, other))
    curves = [
        [
            {key: line[key] for key in ("phase", "epoch", "step", "train_loss", "loss", "accuracy")}
            for line in map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
        ]
        for folder in (one, other)
    ]
    tests = [
        [
            json.loads((Path(folder) / "summary.json").read_text())[key]
            for key in ("accuracy", "loss")
        ]
        for folder in (one, other)
    ]
    return (
        all(torch.equal(a[k], b[k]) for k in a) and curves[0] == curves[1] and tests[0] == tests[1]
    )


def interrupt_once(pattern):
    """Send this process a SIGINT as soon as there is a file that matches."""

    def wait():
        while not list(Path().glob(pattern)):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def test_interrupted_then_resumed_from_the_command_line(finished, capsys):
    folder = finished / "with space=and equals"
    interrupt_once(f"{folder.name}/checkpoints/01-train-step*.safetensors")
    assert main([*ARGUMENTS, f'hydra.run.dir="{folder.name}"']) == 130
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    assert not (folder / "checkpoints" / "01-train.safetensors").exists()
    assert main([f"resume={folder}", "checkpoint.keep=1"]) == 0
    assert same_end("undisturbed", folder)
    assert not list(folder.glob("checkpoints/*step*"))
    capsys.readouterr()
    assert main([f"resume={folder}"]) == 0  # a finished run shows its summary
    assert "test set" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["resume=nowhere"], "nowhere"),
        (["resume=undisturbed", "seed=1"], "seed=1"),
        (["resume=undisturbed", "cluster.wokers=1"], "wokers"),
        (["resume=undisturbed", "+experiment=smoke"], "+experiment=smoke"),
    ],
)
def test_what_cannot_be_resumed_is_a_wrong_configuration(finished, arguments, said, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1


def test_a_diverging_loss_ends_the_run_and_keeps_the_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*ARGUMENTS, "hydra.run.dir=run", "optimizer.lr=1e10"]) == 1
    said = capsys.readouterr().err
    for part in ("phase train", "the loss is", "step", "learning rate"):
        assert part in said
    assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"


RAY_ARGUMENTS = [
    *(argument for argument in ARGUMENTS if not argument.startswith("cluster")),
    "data.train=3000",
    "cluster.hang_timeout_s=8",
]


@pytest.mark.integration
class TestWorkers:
    def start(self, folder):
        return subprocess.Popen(
            [sys.executable, "-m", "trainer", *RAY_ARGUMENTS, f"hydra.run.dir={folder}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def workers(self, driver):
        """Process ids of the Ray workers below a driver."""
        listed = subprocess.run(
            ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split(None, 2) for line in listed.splitlines()]
        below = {driver}
        for _ in range(6):
            below |= {int(pid) for pid, parent, _ in rows if int(parent) in below}
        return [int(pid) for pid, _, args in rows if int(pid) in below and "ray::Worker" in args]

    def test_a_killed_and_a_stopped_worker_cost_nothing_but_time(self, tmp_path, monkeypatch):
        """One run undisturbed; one in which one worker is killed and the other frozen."""
        monkeypatch.chdir(tmp_path)
        assert self.start("undisturbed").wait(100) == 0
        run = self.start("disturbed")
        for number, (hurt, wanted) in enumerate(
            [(signal.SIGKILL, "01-train-step*"), (signal.SIGSTOP, "03-retrain-step*")]
        ):
            deadline = time.monotonic() + 60
            while not list(Path().glob(f"disturbed/checkpoints/{wanted}")):
                assert run.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(self.workers(run.pid)[number % 2], hurt)
        said = run.communicate(timeout=100)[0]
        assert run.returncode == 0, said
        summary = json.loads(Path("disturbed/summary.json").read_text())
        assert summary["restarts"] == 2
        assert "the process died; starting again from the last checkpoint" in said
        assert "no sign of life" in said
        assert same_end("undisturbed", "disturbed")
