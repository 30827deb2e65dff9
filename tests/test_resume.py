"""Runs that are stopped, killed or damaged end with the same bits."""

import contextlib
import itertools
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
from trainer.cluster import WorkerFailed, open_group
from trainer.cluster.inline import InlineGroup
from trainer.config import ClusterConfig
from trainer.engine.world import World
from trainer.experiment import Experiment
from trainer.messages import Checkpoint, PhaseEnded, RunStopped
from trainer.store.serialization import from_bytes, to_bytes
from trainer.testing.ranks import run_ranks
from trainer.worker.phase import LOSS_SCALE
from trainer.worker.run import Start, run_phases

pytestmark = pytest.mark.usefixtures("charts_not_drawn")

WORLD = World.single(torch.device("cpu"))
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
    "quantize": {
        "_target_": "trainer.phases.Quantize",
        "per_channel": False,
        "fold": False,
        "keep": ["zeros", "sharing"],
        "fit": {**FIT, "lr": 0.001, "distill": {"weight": 0.5}},
    },
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
            "_target_": "trainer.data.mnist",
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
    return Experiment.from_config({**settings, **changes})


def run(cfg, start=None, stop_at=None, world=None):
    """(weights, validation, place to go on from) of a run that is asked to stop at a step."""
    world = world or World.single(torch.device("cpu"))
    if stop_at is not None and stop_at[1] == 0:
        world.stop.set()
    start = start or Start(0)
    weights, found, validation = start.weights, None, None
    phase, dense = start.phase, start.dense
    for message in run_phases(world, cfg, start):
        if isinstance(message, PhaseEnded):
            weights, phase = message.weights, message.index + 1
            validation = (message.record.accuracy, message.record.loss)
            dense = weights if phase == 1 else dense
        if isinstance(message, Checkpoint):
            found = message
        if isinstance(message, RunStopped):
            within = found.content if found and found.phase == phase else None
            return weights, None, Start(phase, weights, within, dense)
        if stop_at and world.heartbeat.position >= (stop_at[0], stop_at[1]):
            world.stop.set()
    return weights, validation, None


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp16"},
        {"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01}},
        {"model": {
            "_target_": "trainer.models.ResNetCifar", "depth": 8, "in_channels": 1,
        }, "phases": {
            "train": PHASES["train"],
            "quantize": {"_target_": "trainer.phases.Quantize", "bits": 6, "fit": FIT},
        }},
    ],
    ids=["fp16", "adam", "batch-norm"],
)  # fmt: skip
@pytest.mark.slow
def test_stopped_anywhere_and_resumed_it_ends_in_the_same_bits(changes):
    cfg = config(**changes, checkpoint={"every_steps": 1, "every_seconds": None})
    undisturbed, test, rest = run(cfg)
    assert rest is None
    chance = random.Random(0)
    count = len(cfg.phases)
    places = [(p, chance.randrange(1, STEPS - 1)) for p in sorted({0, count // 2, count - 1})]
    start = None
    for place in places:
        _, nothing, start = run(cfg, start, place)
        assert nothing is None
        assert start.checkpoint is not None
    weights, again, rest = run(cfg, start)
    assert rest is None
    assert again == test
    assert weights == undisturbed, f"stopped at {places}"


@pytest.mark.slow
def test_a_run_stopped_many_times_ends_in_the_same_bits():
    cfg = config(checkpoint={"every_steps": 1, "every_seconds": None})
    undisturbed, test, _ = run(cfg)
    start, stops = None, 0
    for phase in range(len(PHASES)):
        for step in (1, 3, 5):
            _, _, start = run(cfg, start, (phase, step))
            stops += start is not None
    weights, again, _ = run(cfg, start)
    assert stops == 3 * len(PHASES)
    assert (weights, again) == (undisturbed, test)


@pytest.mark.slow
def test_the_loss_scale_continues_after_an_interruption_between_two_phases():
    """fp16: the weights at the end of a phase hold the scale and its history."""
    cfg = config(precision="fp16")
    ended = [m for m in run_phases(WORLD, cfg, Start(0)) if isinstance(m, PhaseEnded)]
    dense = ended[0].weights
    for before, after in itertools.pairwise(ended):
        start = Start(after.index, before.weights, None, dense)
        resumed = [m for m in run_phases(WORLD, cfg, start) if isinstance(m, PhaseEnded)]
        assert [m.weights for m in resumed] == [m.weights for m in ended[after.index :]]
    scales = [json.loads(from_bytes(m.weights)[1][LOSS_SCALE]) for m in ended]
    assert [s["_growth_tracker"] for s in scales] == [STEPS * n for n in range(1, len(PHASES) + 1)]


@pytest.mark.parametrize(
    "changes",
    [{"allreduce": {"wire": "bf16", "bucket_mb": 0.004}}, {"precision": "fp16"}],
    ids=["bf16-wire-buckets", "fp16"],
)
@pytest.mark.slow
def test_three_ranks_stopped_anywhere_end_in_the_same_bits(changes):
    """The ranks are threads, which share torch's random state: they begin with given weights."""
    cfg = config(**changes, checkpoint={"every_steps": 1, "every_seconds": None})

    def on_three(*arguments):
        return run_ranks(3, lambda world: run(cfg, *arguments, world))[0]

    torch.manual_seed(cfg.config.seed)
    begin = Start(0, to_bytes(cfg.build_model().state_dict()))
    undisturbed, test, _ = on_three(begin, None)
    chance = random.Random(1)
    places = [(phase, chance.randrange(1, STEPS - 1)) for phase in range(len(PHASES))]
    start = begin
    for place in places:
        _, nothing, start = on_three(start, place)
        assert nothing is None
        assert start.checkpoint is not None
    assert on_three(start, None) == (undisturbed, test, None), f"stopped at {places}"


def test_the_group_passes_a_stop_on():
    group = InlineGroup(ClusterConfig(workers=1, backend="inline", threads=1))
    group.start()
    group.stop_requested.set()
    messages = list(group.run(run_phases, config(), Start(0)))
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
SMALL = [*ARGUMENTS, "data.batch_size=16", "data.train=600"]  # about as many steps


@contextlib.contextmanager
def signal_handlers_kept():
    kept = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


@pytest.fixture
def handlers():
    """The signal handlers of the tests are kept."""
    with signal_handlers_kept():
        yield


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory):
    """A run that was left alone, to compare others with; nobody writes to it."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    with signal_handlers_kept():
        assert main([*SMALL, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.fixture
def finished(undisturbed_run, tmp_path, monkeypatch, handlers):
    """A folder to work in, with an undisturbed run to compare others with."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "undisturbed").symlink_to(undisturbed_run)
    return tmp_path


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


@contextlib.contextmanager
def once(pattern, act):
    """Call `act` as soon as there is a file that matches, while the block lasts."""
    folder, over = Path.cwd(), threading.Event()

    def wait():
        while not list(folder.glob(pattern)):
            if over.wait(0.005):
                return
        act()

    watcher = threading.Thread(target=wait)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@pytest.mark.slow
def test_interrupted_then_resumed_from_the_command_line(finished, capsys):
    folder = finished / "with space=and equals"
    pattern = f"{folder.name}/checkpoints/01-train-step*.safetensors"
    with once(pattern, lambda: os.kill(os.getpid(), signal.SIGINT)):
        assert main([*SMALL, f'hydra.run.dir="{folder.name}"']) == 130
    before = json.loads((folder / "summary.json").read_text())
    assert before["status"] == "interrupted"
    assert not (folder / "checkpoints" / "01-train.safetensors").exists()
    assert main([f"resume={folder}", "checkpoint.keep=1"]) == 0
    assert same_end("undisturbed", folder)
    assert not list(folder.glob("checkpoints/*step*"))
    after = json.loads((folder / "summary.json").read_text())
    trained = sum(phase["seconds"] for phase in after["phases"])
    assert after["seconds"] > max(before["seconds"] / 2, trained)  # of both commands
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


@pytest.mark.usefixtures("handlers")
def test_a_diverging_loss_ends_the_run_and_keeps_the_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*SMALL, "hydra.run.dir=run", "optimizer.lr=1e10"]) == 1
    said = capsys.readouterr().err
    for part in ("phase train", "the loss is", "step", "learning rate"):
        assert part in said
    assert json.loads(Path("run/summary.json").read_text())["status"] == "failed"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(file):
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as sink:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while sink.write(bytes(size)):
                    pass


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_run_can_be_resumed_later(finished, small_disk, capsys):
    run, filler = small_disk / "run", small_disk / "filler"
    with once("disk/run/checkpoints/01-train-step*.safetensors", lambda: fill(filler)):
        assert main([*SMALL, f"hydra.run.dir={run}"]) == 1
    out, said = capsys.readouterr()
    assert f"resume with: python -m trainer resume={run}" in out
    assert "No space left" in said
    assert said.count("\n") == 1
    assert list(run.glob("checkpoints/*step*.safetensors"))
    assert main([f"resume={run}"]) == 1  # still full
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(run.rglob("*.part"))
    filler.unlink()
    assert main([f"resume={run}"]) == 0
    assert same_end("undisturbed", run)


@pytest.mark.usefixtures("handlers")
@pytest.mark.slow
def test_a_deleted_run_directory_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, gone = tmp_path / "run", tmp_path / "gone"
    # At once, and not file by file, while others are written.
    with once("run/checkpoints/01-train-step*.safetensors", lambda: run.rename(gone)):
        assert main([*SMALL, "hydra.run.dir=run"]) == 1
    out, said = capsys.readouterr()
    assert "resume with" not in out
    assert said.startswith("failed: ")
    assert "No such file or directory" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(tmp_path):
    """The first waits for a step that takes a minute."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time, torch\n"
        "from trainer.models import LeNet5\n"
        "class Net(LeNet5):\n"
        "    def forward(self, x):\n"
        "        if torch.is_grad_enabled():\n"
        "            pathlib.Path('stepping').touch()\n"
        "            time.sleep(60)\n"
        "        return super().forward(x)\n"
    )
    command = [*SMALL, "model={_target_: slow.Net}", "hydra.run.dir=run"]
    run = subprocess.Popen([sys.executable, "-m", "trainer", *command], cwd=tmp_path)
    try:
        while not (tmp_path / "stepping").exists():
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            run.wait(0.5)
        run.send_signal(signal.SIGINT)
        assert run.wait(30) == 130
    finally:
        run.kill()


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_two_ray_workers_of_which_one_is_killed_end_in_the_same_bits():
    """Several buckets, sent as bf16; killed in the middle of the pruning ramp."""
    cluster = ClusterConfig(workers=2, cpus_per_worker=0.25, threads=1, hang_timeout_s=20)
    cfg = config(
        allreduce={"wire": "bf16", "bucket_mb": 0.004},
        checkpoint={"every_steps": 1, "every_seconds": None},
    )
    group = open_group(cluster)
    group.start()
    try:
        undisturbed = list(group.run(run_phases, cfg, Start(0)))
        left, found = b"", b""
        with pytest.raises(WorkerFailed, match="worker 1"):  # noqa: PT012 - raised on the way
            for message in group.run(run_phases, cfg, Start(0)):
                if isinstance(message, PhaseEnded):
                    left = message.weights
                if isinstance(message, Checkpoint) and (message.phase, message.step) == (1, 3):
                    found = bytes(message.content)
                    os.kill(group._ranks[1].pid, signal.SIGKILL)
        group.restart()
        again = list(group.run(run_phases, cfg, Start(1, left, found)))
        assert again[-1].weights == undisturbed[-1].weights
    finally:
        group.stop()
