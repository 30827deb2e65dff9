"""Whole sweeps by the command, in this process: small nets on a few digits."""

import csv
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import optuna
import pytest
import torch

from trainer.__main__ import main
from trainer.config import Config, typed
from trainer.run import Start, experiment

ARGUMENTS = [
    "+experiment=sweep_smoke", "cluster=inline", "cluster.threads=1", "sweep.slots=1",
    "data.train=100", "data.validation=100", "data.test=100", "sweep.trials=3",
]  # fmt: skip
FOLDER = Path("outputs/sweep_smoke/sweep")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, with the signal handlers of the tests kept."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def rows():
    with (FOLDER / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def summary(folder=FOLDER):
    return json.loads((folder / "summary.json").read_text())


def test_the_command_of_the_best_trial_gives_the_same_result():
    assert main([*ARGUMENTS, "seed=5"]) == 0
    best = summary()["best"][0]
    command = shlex.split(best["command"])
    assert command[:3] == ["python", "-m", "trainer"]
    assert main([*command[3:], "hydra.run.dir=again"]) == 0
    (phase,) = summary(Path("again"))["phases"]
    assert {key: phase[key] for key in ("accuracy", "loss", "macs", "nonzero")} == {
        key: best["measures"][key] for key in ("accuracy", "loss", "macs", "nonzero")
    }


def test_the_same_command_goes_on_and_repeats_nothing(capsys):
    assert main(ARGUMENTS) == 0
    before = rows()
    assert main([*ARGUMENTS[:-1], "sweep.trials=4"]) == 0
    assert rows()[:3] == before
    assert [row["state"] for row in rows()] == ["COMPLETE"] * 4
    assert main([*ARGUMENTS, "model.hidden=8"]) == 2
    assert "another model" in capsys.readouterr().err
    assert len(rows()) == 4


@pytest.mark.parametrize("resumed", [False, True])
def test_ctrl_c_saves_and_the_same_command_or_resume_finishes_the_trial(resumed):
    def interrupt():
        while not list(FOLDER.glob("trials/*/checkpoints/*")):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    long = [*ARGUMENTS, "phases.train.fit.epochs=20", "checkpoint.every_steps=2", "sweep.trials=2"]
    threading.Thread(target=interrupt, daemon=True).start()
    assert main(long) == 130
    assert summary()["status"] == "interrupted"
    assert summary()["trials"]["unfinished"] == 1
    assert main([f"resume={FOLDER}", "checkpoint.keep=1"] if resumed else long) == 0
    assert [row["state"] for row in rows()] == ["COMPLETE"] * 2
    assert [row["epochs"] for row in rows()] == ["20", "20"]


@pytest.mark.integration
def test_a_second_ctrl_c_ends_the_sweep_at_once(tmp_path):
    """With a net that would take a minute for its first step."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time\n"
        "from trainer.models import ConvNet\n"
        "class Net(ConvNet):\n"
        "    def forward(self, x):\n"
        "        if self.training:\n"
        "            pathlib.Path('stepping').touch()\n"
        "            time.sleep(60)\n"
        "        return super().forward(x)\n"
    )
    command = [*ARGUMENTS, "model._target_=slow.Net"]
    run = subprocess.Popen([sys.executable, "-m", "trainer", *command])
    try:
        while not (tmp_path / "stepping").exists():
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        while not (FOLDER / "summary.json").exists():
            assert run.poll() is None
            time.sleep(0.02)
        run.send_signal(signal.SIGINT)
        assert run.wait(10) == 130
    finally:
        run.kill()
    assert summary()["status"] == "interrupted"
    assert summary()["trials"]["unfinished"] == 1


@pytest.mark.integration
def test_a_killed_driver_loses_and_repeats_no_finished_trial():
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *ARGUMENTS], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.kill()
    process.communicate()
    assert main(ARGUMENTS) == 0
    told = (FOLDER / "log.txt").read_text()
    assert told.count("trial 0: ") == 1
    assert first in told
    assert [row["state"] for row in rows()] == ["COMPLETE"] * 3


def test_a_diverging_trial_is_retried_then_failed_with_its_reason(capsys):
    params = "sweep.params={optimizer.lr: 'choice(1e20)', model.kernel_size: null}"
    assert main([*ARGUMENTS, params, "sweep.trials=1"]) == 1
    assert "no trial was completed" in capsys.readouterr().err
    (row,) = rows()
    assert row["state"] == "FAIL"
    assert row["failures"] == "2"
    assert "the loss is" in row["reason"]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("sweep.params={model.dept: 'range(1,3)'}", "no model.dept"),
        ("sweep.params={model.depth: 'range(3,3)'}", "empty"),
        ("sweep.params={optimizer.lr: 'interval(-1,1)'}", "optimizer.lr=-1.0"),
        ("sweep.params={model.kernel_size: 'choice(3,4)'}", "model.kernel_size.0=4"),
        ("sweep.params={phases.train.fit.epochs: 'range(-1,2)'}", "epochs=-1"),
        ("sweep.params={model: 'choice(a,b)'}", "it is a section"),
        ("sweep.params={cluster.workers: 'range(1,3)'}", "cannot be searched"),
        ("sweep.during={model.with: 3}", "no model.with"),
        ("sweep.objectives.speed=maximize", "speed: unknown"),
        ("sweep.sampler=annealing", "tpe, random, grid"),
        ("sweep.sampler=grid", "no end"),
        ("sweep.slots=2", "cluster.backend=inline"),
    ],
)
def test_mistakes_are_found_before_anything_starts(argument, said, capsys, tmp_path):
    assert main([*ARGUMENTS, argument]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_budgets_end_a_sweep_and_leave_the_rest_for_later():
    assert main([*ARGUMENTS, "phases.train.fit.epochs=40", "sweep.epochs=45"]) == 0
    assert 45 <= summary()["epochs"] < 80
    assert summary()["trials"] == {"complete": 1, "pruned": 0, "failed": 0, "unfinished": 1}


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_a_warm_worker_gives_the_bits_of_a_cold_one():
    import yaml

    from tests.test_main import capture
    from trainer.cluster import open_group
    from trainer.messages import PhaseEnded

    plain = yaml.safe_load(capture([*ARGUMENTS, "cluster=local", "cluster.workers=1", "--cfg"]))
    cfg = typed(Config, plain)
    other = typed(Config, {**plain, "seed": 9, "model": {**plain["model"], "depth": 1}})

    def weights(group, which):
        ended = [m for m in group.run(experiment, which, Start(0))]
        return next(m.weights for m in ended if isinstance(m, PhaseEnded))

    results = []
    for before in ([], [other, cfg]):
        group = open_group(cfg.cluster)
        group.start()
        try:
            for first in before:
                weights(group, first)
            results.append(weights(group, cfg))
        finally:
            group.stop()
    assert results[0] == results[1]


def test_trials_share_their_first_phases_and_end_in_the_same_bits(monkeypatch):
    wanted = [
        "+experiment=interference",
        "cluster=inline",
        "cluster.threads=1",
        "sweep.slots=1",
        "data.train=300",
        "data.validation=100",
        "data.test=100",
        "sweep.params.seed='choice(0,1)'",
        *(f"phases.{name}.fit.epochs=1" for name in ("train", "prune", "share", "quantize")),
    ]
    assert main([*wanted, "hydra.sweep.dir=shared"]) == 0
    assert len(list(Path("shared/prefixes").iterdir())) == 2  # one for each seed
    assert main([*wanted, "sweep.prefix=null", "hydra.sweep.dir=alone"]) == 0
    measures = []
    for folder in ("shared", "alone"):
        with (Path(folder) / "trials.csv").open() as file:
            lines = [{k: v for k, v in row.items() if k not in ("number", "seconds", "epochs")}
                     for row in csv.DictReader(file)]  # fmt: skip
        measures.append(sorted(map(str, lines)))
    assert len(measures[0]) == 16
    assert measures[0] == measures[1]
    analysis = summary(Path("shared"))["analysis"]
    assert len(analysis["tables"][0]["rows"]) == 8
    assert len(analysis["sentences"]) == 8
    assert "points lost" in Path("shared/report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["sweep.prefix=training"], "sweep.prefix=training: there is no such phase"),
        (["sweep.analysis=all"], "sweep.analysis=all: it must be one of interference, sensitivity"),
        (["phases.prune.enabled=1"], "phases.prune.enabled=1: it must be true or false"),
    ],
)
def test_what_cannot_be_shared_or_asked_is_refused(changes, said, capsys):
    assert main(["+experiment=interference", "cluster=inline", *changes]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_a_data_parallel_trial_is_pruned_on_both_ranks_together():
    """Did one rank go on alone, the next collective would fail, and the trial start again."""
    params = "sweep.params={optimizer.lr: 'choice(0.05,1e-9,0.04)', model.kernel_size: null}"
    assert main([
        *ARGUMENTS[:1], *ARGUMENTS[4:], params, "sweep.sampler=grid", "sweep.slots=1",
        "sweep.min_trials=1", "cluster.workers=2", "cluster.cpus_per_worker=0.25",
        "cluster.threads=1", "phases.train.fit.epochs=10",
    ]) == 0  # fmt: skip
    assert [row["state"] for row in rows()][:2] == ["COMPLETE", "PRUNED"]
    assert [row["failures"] for row in rows()] == ["0", "0", "0"]
    study = optuna.load_study(
        study_name="sweep_smoke/sweep", storage=f"sqlite:///{FOLDER.resolve()}/study.db"
    )
    assert list(study.trials[0].intermediate_values) == list(range(1, 11))
    assert list(study.trials[1].intermediate_values) == [1]


@pytest.mark.integration
def test_a_sweep_waits_for_room_when_its_only_node_is_lost(tmp_path):
    """Two slots on one node, which is removed in the middle of two trials; another one comes."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp", ignore_cleanup_errors=True) as short:
        script = Path(__file__).with_name("lost_node.py")
        done = subprocess.run(
            [sys.executable, str(script), *ARGUMENTS[:1], *ARGUMENTS[4:7],
             "cluster.workers=1", "cluster.threads=1", "sweep.slots=2", "sweep.trials=3",
             "sweep.pruner=none", "phases.train.fit.epochs=20"],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "RAY_TMPDIR": short,
                "RAY_health_check_period_ms": "300",  # a lost node is known sooner
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            },
            timeout=100,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["state"] for row in rows()] == ["COMPLETE"] * 3
    told = (FOLDER / "log.txt").read_text()
    assert "it starts again" in told
    assert [told.count(f"trial {number}: accuracy") for number in range(3)] == [1] * 3
    finished = (tmp_path / "finished").read_text().split()
    assert [row["failures"] for row in rows() if row["number"] in finished] == ["0"] * len(finished)
    assert finished
