"""Whole sweeps by the command, in this process: small nets on a few digits."""

import csv
import json
import math
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
import psutil
import pytest
import torch
import yaml

from trainer.__main__ import main
from trainer.config.compose import conf_dir
from trainer.errors import ConfigError
from trainer.experiment import Experiment
from trainer.models import LeNet300
from trainer.store.directory import RunDirectory
from trainer.sweeps.plan import Plan
from trainer.sweeps.study import SweepStudy
from trainer.worker.run import Start, run_phases

ARGUMENTS = [
    "+experiment=sweep_smoke", "cluster=inline", "cluster.threads=1", "sweep.slots=1",
    "data.train=100", "data.validation=100", "data.test=100", "sweep.trials=3",
]  # fmt: skip
ONLY = [f"sweep.params.{key}=null" for key in ("model.depth", "model.kernel_size", "optimizer.lr")]
FOLDER = Path("outputs/sweep_smoke/sweep")


pytestmark = pytest.mark.usefixtures("elsewhere", "charts_not_drawn")


def rows():
    with (FOLDER / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def summary(folder=FOLDER):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_the_command_of_the_best_trial_gives_the_same_result():
    assert main([*ARGUMENTS, "seed=5", "logger=[csv]"]) == 0
    for row in rows():
        with (FOLDER / "curves" / f"000{row['number']}" / "curves.csv").open() as file:
            curves = [float(each["value"]) for each in csv.DictReader(file)
                      if each["name"] == "epoch/validation_accuracy"]  # fmt: skip
        assert len(curves) == int(row["epochs"])
        if row["accuracy"]:
            assert curves[-1] == float(row["accuracy"])
    best = summary()["best"][0]
    command = shlex.split(best["command"])
    assert command[:3] == ["python", "-m", "trainer"]
    assert main([*command[3:], "hydra.run.dir=again"]) == 0
    (phase,) = summary(Path("again"))["phases"]
    assert {key: phase[key] for key in ("accuracy", "loss", "macs", "nonzero")} == {
        key: best["measures"][key] for key in ("accuracy", "loss", "macs", "nonzero")
    }


@pytest.mark.slow
def test_the_same_command_continues_and_repeats_nothing(capsys):
    assert main(ARGUMENTS) == 0
    before = rows()
    assert main([*ARGUMENTS[:-1], "sweep.trials=4"]) == 0
    assert rows()[:3] == before
    assert [row["state"] for row in rows()] == ["COMPLETE"] * 4
    assert main([*ARGUMENTS, "model.hidden=8"]) == 2
    assert "another model" in capsys.readouterr().err
    assert len(rows()) == 4


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.slow
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
    costs = [float(row["kwh"]) for row in rows()]
    assert min(costs) > 0
    assert summary()["cost"]["kwh"] == pytest.approx(sum(costs), rel=1e-4)


@pytest.mark.integration
def test_a_second_ctrl_c_ends_the_sweep_at_once(tmp_path):
    """With a net that would take a minute for its first step."""
    (tmp_path / "slow.py").write_text(
        "import pathlib, time, torch\n"
        "from trainer.models import ConvNet\n"
        "class Net(ConvNet):\n"
        "    def forward(self, x):\n"
        "        if torch.is_grad_enabled():\n"
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


@pytest.mark.slow
def test_a_trial_that_ends_in_nan_is_retried_then_failed(monkeypatch):
    from trainer.sweeps import trial

    real, seen = trial.measure, []

    def measure(records):
        seen.append(len(seen))
        return real(records) | ({"loss": math.nan} if len(seen) <= 2 else {})

    monkeypatch.setattr(trial, "measure", measure)
    assert main([*ARGUMENTS, "sweep.trials=2"]) == 0
    assert [row["state"] for row in rows()] == ["FAIL", "COMPLETE"]
    assert rows()[0]["failures"] == "2"
    assert rows()[0]["reason"] == "the loss after the last phase is nan"


FAILS_ONCE = """
import pathlib, time, torch
from trainer.models import ConvNet
class Net(ConvNet):
    def forward(self, x):
        if torch.is_grad_enabled():
            steps = pathlib.Path('{steps}')
            with steps.open('a') as file:
                file.write('.')
            if steps.stat().st_size == 1 + 5:  # one is the check before the first step
                {how}
        return super().forward(x)
"""


@pytest.mark.slow
def test_a_trial_that_failed_continues_from_its_last_checkpoint(tmp_path, monkeypatch):
    """Of six steps, two an epoch, the fifth fails; the second and the fourth left checkpoints."""
    (tmp_path / "once.py").write_text(
        FAILS_ONCE.format(steps=tmp_path / "steps", how="raise ArithmeticError('once')")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([
        *ARGUMENTS, "model._target_=once.Net", "phases.train.fit.epochs=3",
        "checkpoint.every_steps=2", "sweep.trials=1",
    ]) == 0  # fmt: skip
    assert "ArithmeticError: once; it starts again" in (FOLDER / "log.txt").read_text()
    (row,) = rows()
    assert (row["state"], row["failures"], row["epochs"]) == ("COMPLETE", "1", "3")
    assert len((tmp_path / "steps").read_text()) == 1 + 5 + 1 + 2  # the fifth again, and the sixth


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_a_trial_that_hangs_is_ended_and_continues_from_its_last_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "hangs.py").write_text(
        FAILS_ONCE.format(steps=tmp_path / "steps", how="time.sleep(60)")
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main([
        *ARGUMENTS[:1], *ARGUMENTS[2:], "model._target_=hangs.Net", "phases.train.fit.epochs=3",
        "checkpoint.every_steps=2", "sweep.trials=1", "cluster.hang_timeout_s=8",
    ]) == 0  # fmt: skip
    (row,) = rows()
    assert (row["state"], row["failures"], row["epochs"]) == ("COMPLETE", "1", "3")
    assert "no progress for cluster.hang_timeout_s=8" in (FOLDER / "log.txt").read_text()
    assert len((tmp_path / "steps").read_text()) == 1 + 5 + 1 + 2


@pytest.mark.slow
def test_what_a_trials_messages_meet_here_is_that_trials_failure(monkeypatch):
    from trainer.sweeps import trial

    real, calls = trial.as_json, []

    def as_json(record):
        calls.append(record)
        if len(calls) <= 2:
            raise MemoryError("no room to encode")
        return real(record)

    monkeypatch.setattr(trial, "as_json", as_json)
    wanted = ["sweep.objectives={bytes: minimize}", "sweep.trials=2"]
    assert main([*ARGUMENTS, *wanted]) == 0
    assert float(rows()[1]["bytes"]) > 100
    assert [row["state"] for row in rows()] == ["FAIL", "COMPLETE"]
    assert rows()[0]["reason"] == "no room to encode"
    assert "Traceback" in (FOLDER / "log.txt").read_text()


INIT = [
    *ARGUMENTS,
    "sweep.sampler=grid",
    *ONLY,
    "sweep.params.init_from=choice(a.pt,b.pt)",
]


def test_initial_weights_are_validated_against_the_model(capsys, tmp_path):
    assert main(INIT) == 2
    assert "with init_from=a.pt, init_from=a.pt: it cannot be read" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    torch.save(LeNet300().state_dict(), "a.pt")
    assert main(INIT) == 2
    assert "in the model" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.slow
def test_weights_that_are_gone_later_fail_their_trial_alone(monkeypatch, capsys):
    from trainer.experiment import weights as experiment_weights

    assert main([*INIT, "--cfg"]) == 0
    net = Experiment.from_config(yaml.safe_load(capsys.readouterr().out)).build_model()
    for name in ("a.pt", "b.pt"):
        torch.save(net.state_dict(), name)
    real, seen = experiment_weights.read_initial, []

    def weights(path, *args, **more):
        seen.append(path.name)
        if seen.count("b.pt") > 1:  # the first time, the settings are validated
            raise ConfigError(f"init_from={path}: gone")
        return real(path, *args, **more)

    monkeypatch.setattr(experiment_weights, "read_initial", weights)
    assert main(INIT) == 0
    assert [row["state"] for row in rows()] == ["COMPLETE", "FAIL"]
    assert rows()[1]["reason"] == "init_from=b.pt: gone"


def test_a_value_between_the_ends_that_no_model_takes_fails_its_trial_alone(monkeypatch):
    """Also where it is the first that is drawn, and no trial has begun."""
    start = SweepStudy.start

    def four_first(study, number):
        return {**start(study, number), "model.kernel_size": 3 if number else 4}

    monkeypatch.setattr(SweepStudy, "start", four_first)
    params = "sweep.params={model.kernel_size: 'range(3,6)', model.depth: null, optimizer.lr: null}"
    assert main([*ARGUMENTS, params, "~sweep.lengths", "sweep.trials=2"]) == 0
    assert [row["state"] for row in rows()] == ["FAIL", "COMPLETE"]
    assert "kernel_size=4" in rows()[0]["reason"]


def test_what_no_trial_can_begin_with_is_a_wrong_configuration(capsys, tmp_path):
    assert main([*ARGUMENTS, "data.root=/no/where"]) == 2
    assert "/no/where" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["report.write_report", "study.SweepStudy.complete"])
@pytest.mark.slow
def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_the_log(
    where, capsys, monkeypatch
):
    def lost(*args, **kwargs):
        raise ArithmeticError("storage gone\nand more")

    module = (
        "trainer.sweeps.results.write_report" if "report" in where else f"trainer.sweeps.{where}"
    )
    monkeypatch.setattr(module, lost)
    assert main(ARGUMENTS) == 1
    shown, said = capsys.readouterr()
    assert said.startswith("failed: storage gone (more in ")
    assert said.count("storage gone") == said.count("\n") == 1
    assert "results in" in shown
    assert "ArithmeticError: storage gone" in (FOLDER / "log.txt").read_text()
    assert summary()["status"] == "failed"
    assert summary()["error"].startswith("storage gone")


@pytest.mark.slow
def test_where_no_trial_keeps_the_constraints_the_closest_is_named(capsys):
    limits = "sweep.constraints={nonzero: '<= 1000', accuracy: '>= 0'}"
    assert main([*ARGUMENTS, limits, "sweep.trials=2", "sweep.refit=true"]) == 0
    assert summary()["best"] == []
    sizes = {int(row["number"]): float(row["nonzero"]) for row in rows()}
    closest = min(sizes, key=sizes.get)
    said = (
        f"no trial meets sweep.constraints; the closest is trial {closest}, which misses nonzero "
        f"by {sizes[closest] - 1000:.6g}"
    )
    assert said in capsys.readouterr().out
    assert said in (FOLDER / "log.txt").read_text()
    assert not (FOLDER / "best").exists()


@pytest.mark.slow
def test_contradicting_values_of_a_trial_are_reported(capsys, monkeypatch):
    """The ends of ranges are tried before, not what lies between."""
    real = Plan.trial

    def trial(plan, drawn):
        if drawn["seed"] == 1:
            raise ConfigError("seed=1: not with this model")
        return real(plan, drawn)

    monkeypatch.setattr(Plan, "trial", trial)
    assert main([*ARGUMENTS, *ONLY, "sweep.params.seed=range(0,3)", "sweep.sampler=grid"]) == 0
    assert [row["state"] for row in rows()] == ["COMPLETE", "FAIL", "COMPLETE"]
    told = "trial 1: failed: seed=1: not with this model"
    assert told in capsys.readouterr().out
    assert told in (FOLDER / "log.txt").read_text()


@pytest.mark.slow
def test_a_better_trial_is_refitted_and_the_previous_refit_is_moved(capsys):
    wanted = [
        *ARGUMENTS, "sweep.refit=true", "phases.train.fit.epochs=10", "sweep.sampler=grid",
        "sweep.pruner=none", "sweep.params={optimizer.lr: 'choice(1e-9,0.05)', "
        "model.kernel_size: null, model.depth: null}", "sweep.lengths={}",
    ]  # fmt: skip
    best = FOLDER / "best"
    assert main([*wanted, "sweep.trials=1"]) == 0
    assert RunDirectory(best).read_config()["optimizer"]["lr"] == 1e-9
    assert main([*wanted, "sweep.trials=2"]) == 0
    assert "the run of the previous one is now in" in capsys.readouterr().out
    assert RunDirectory(best).read_config()["optimizer"]["lr"] == 0.05
    assert RunDirectory(FOLDER / "best-1").read_config()["optimizer"]["lr"] == 1e-9
    trained = (best / "metrics.jsonl").read_text()
    assert main([*wanted, "sweep.trials=2", "checkpoint.keep=1"]) == 0  # the same one
    assert (best / "metrics.jsonl").read_text() == trained
    assert not (FOLDER / "best-2").exists()
    assert RunDirectory(FOLDER).read_config()["sweep"]["trials"] == 2


def test_a_new_study_does_not_take_up_what_trials_of_another_left():
    """Its data base was deleted; trials go by the same numbers again."""
    left = FOLDER / "trials" / "0000" / "checkpoints"
    left.mkdir(parents=True)
    (left / "01-train-step-00000002.safetensors").write_text("of another trial")
    assert main([*ARGUMENTS, "sweep.trials=1"]) == 0
    assert "damaged" not in (FOLDER / "log.txt").read_text()
    assert [row["epochs"] for row in rows()] == ["2"]


@pytest.mark.slow
def test_what_only_the_data_refuse_is_one_trials_failure_but_for_two_a_wrong_configuration(capsys):
    wanted = [*ARGUMENTS, *ONLY, "sweep.sampler=grid"]
    assert main([*wanted, "sweep.params.data.train=choice(70000,100)"]) == 0
    assert [row["state"] for row in rows()] == ["FAIL", "COMPLETE"]
    assert "70000" in rows()[0]["reason"]
    both = "sweep.params.data.train=choice(70000,80000)"
    assert main([*wanted, both, "hydra.sweep.dir=other"]) == 2
    assert not Path("other").exists()


@pytest.mark.slow
def test_a_study_has_the_settings_and_the_command_that_began_it():
    """An earlier command had failed before there was a study."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.sweeps.pool.Pool.open", killed)
        with pytest.raises(Killed):
            main([*ARGUMENTS, "seed=6"])
    assert main([*ARGUMENTS, "seed=7", "sweep.trials=1"]) == 0
    assert "seed=7" in shlex.split(summary()["best"][0]["command"])
    assert RunDirectory(FOLDER).read_config()["seed"] == 7
    (FOLDER / "command.json").unlink()
    assert main([f"resume={FOLDER}"]) == 2
    assert main([*ARGUMENTS, "seed=7", "sweep.trials=2"]) == 0
    assert "seed=7" in shlex.split(summary()["best"][0]["command"])


@pytest.mark.slow
def test_another_storage_is_refused(capsys):
    assert main([*ARGUMENTS, "sweep.trials=1"]) == 0
    storage = "sweep.storage=sqlite:///elsewhere.db"
    assert main([*ARGUMENTS, "sweep.trials=2", storage]) == 2
    assert "the trials of" in capsys.readouterr().err
    assert not Path("elsewhere.db").exists()
    assert len(rows()) == 1


@pytest.mark.slow
def test_a_sweep_that_only_resume_got_to_start_still_tells_commands_that_work(capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.sweeps.pool.Pool.open", killed)
        with pytest.raises(Killed):
            main([*ARGUMENTS, "sweep.trials=1"])
    assert main([f"resume={FOLDER}"]) == 0
    command = shlex.split(summary()["best"][0]["command"])
    assert command[3] == ARGUMENTS[0]
    assert main([*command[3:], "--cfg"]) == 0


@pytest.mark.slow
def test_the_command_of_a_trial_keeps_other_arguments(capsys):
    experiments = Path("sweeps") / "experiment"
    experiments.mkdir(parents=True)
    shipped = conf_dir() / "experiment" / "sweep_smoke.yaml"
    (experiments / "mine.yaml").write_text(shipped.read_text())
    mine = ["--config-dir", "sweeps", "+experiment=mine", *ARGUMENTS[1:], "sweep.trials=1"]
    assert main(mine) == 0
    command = shlex.split(summary()["best"][0]["command"])
    assert command[3:6] == ["--config-dir", "sweeps", "+experiment=mine"]
    assert not any(argument.startswith("sweep.") for argument in command)
    assert main([*command[3:], "--cfg"]) == 0


@pytest.mark.slow
def test_the_run_of_the_best_that_was_killed_before_it_began_is_begun_again():
    (FOLDER / "best").mkdir(parents=True)  # and nothing in it
    assert main([*ARGUMENTS, "sweep.trials=1", "sweep.refit=true"]) == 0
    assert (FOLDER / "best" / "summary.json").exists()
    assert not (FOLDER / "best-2").exists()


@pytest.mark.slow
def test_a_winner_that_cannot_be_trained_in_full_does_not_make_the_sweep_a_wrong_one(capsys):
    many = ["data.train=70000", "sweep.trial_overrides.data.train=100", "sweep.refit=true"]
    assert main([*ARGUMENTS, "sweep.trials=1", *many]) == 1
    assert "the best trial cannot be run in full: " in capsys.readouterr().err
    assert summary()["status"] == "done"


@pytest.mark.slow
def test_resume_continues_with_the_last_budget():
    assert main([*ARGUMENTS, "sweep.trials=1"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.sweeps.search.Search.run", killed)
        with pytest.raises(Killed):
            main([*ARGUMENTS, "sweep.trials=2"])
    assert main([f"resume={FOLDER}"]) == 0
    assert [row["state"] for row in rows()] == ["COMPLETE"] * 2


class Killed(BaseException):
    """No handler of errors runs after a real one either."""


def killed(*_):
    raise Killed


@pytest.mark.integration
def test_a_signal_while_ray_starts_leaves_nothing_behind():
    """SIGTERM, for which Ray sets handlers of its own while it starts."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp", ignore_cleanup_errors=True) as short:
        run = subprocess.Popen(
            [sys.executable, "-m", "trainer", *ARGUMENTS[:1], *ARGUMENTS[4:]],
            env={**os.environ, "TMPDIR": short},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while not list(Path(short).glob("trainer-*/session_*")):  # ray.init is at work
            assert run.poll() is None
            time.sleep(0.01)
        family = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(signal.SIGTERM)
        _, told = run.communicate(timeout=180)
        assert run.returncode == 143
        assert b"SIGTERM received" not in told
        deadline = time.monotonic() + 30
        while any(p.is_running() for p in family) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not any(p.is_running() for p in family)
        assert list(Path(short).glob("trainer-*")) == []
    assert summary()["status"] == "interrupted"


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
        ("sweep.trial_overrides={model.with: 3}", "no model.with"),
        ("sweep.objectives.speed=maximize", "speed: unknown"),
        ("sweep.sampler=annealing", "tpe, random, grid"),
        ("sweep.sampler=grid", "infinitely many"),
        ("sweep.slots=2", "cluster.backend=inline"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_found_before_anything_starts(argument, said, capsys, tmp_path):
    assert main([*ARGUMENTS, argument]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_budgets_end_a_sweep_and_leave_the_rest_for_later():
    assert main([*ARGUMENTS, "phases.train.fit.epochs=40", "sweep.epochs=45"]) == 0
    assert 45 <= summary()["epochs"] < 80
    assert summary()["trials"] == {"complete": 1, "pruned": 0, "failed": 0, "unfinished": 1}


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_a_warm_worker_gives_the_bits_of_a_cold_one():
    from tests.experiments import printed
    from trainer.cluster import open_group
    from trainer.messages import PhaseEnded

    plain = printed(*ARGUMENTS, "cluster=local", "cluster.workers=1")
    cfg = Experiment.from_config(plain)
    other = Experiment.from_config({**plain, "seed": 9, "model": {**plain["model"], "depth": 1}})

    def weights(group, which):
        ended = [m for m in group.run(run_phases, which, Start(0))]
        return next(m.weights for m in ended if isinstance(m, PhaseEnded))

    group = open_group(cfg.config.cluster)
    group.start()
    try:
        cold, _, warm = (weights(group, which) for which in (cfg, other, cfg))
    finally:
        group.stop()
    assert cold == warm


@pytest.mark.slow
def test_trials_share_their_first_phases_and_end_in_the_same_bits(tmp_path, monkeypatch):
    """With a net so small that it takes no time to train and to encode."""
    (tmp_path / "tiny.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, classes):\n"
        "        super().__init__()\n"
        "        self.fc1, self.fc2 = nn.Linear(784, 6), nn.Linear(6, 8)\n"
        "        self.fc3 = nn.Linear(8, 10)\n"
        "    def forward(self, x):\n"
        "        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    wanted = [
        "+experiment=interference",
        "cluster=inline",
        "cluster.threads=1",
        "sweep.slots=1",
        "artifact.coder=huffman",
        "model._target_=tiny.Net",
        "data.train=100",
        "data.validation=50",
        "data.test=50",
        "sweep.params.seed=choice(0,1)",
        *(f"phases.{name}.fit.epochs=1" for name in ("train", "prune", "share", "quantize")),
    ]
    assert main([*wanted, "hydra.sweep.dir=shared"]) == 0
    assert len(list(Path("shared/shared_phases").iterdir())) == 2  # one for each seed
    monkeypatch.setattr("trainer.sweeps.results.write_report", lambda *_: None)  # one is enough
    assert main([*wanted, "sweep.shared_phases=null", "hydra.sweep.dir=alone"]) == 0
    measures = []
    apart = {"number", "epochs", "seconds", "kwh"}  # of the trial alone
    for folder in ("shared", "alone"):
        with (Path(folder) / "trials.csv").open() as file:
            lines = [{k: v for k, v in row.items() if k not in apart}
                     for row in csv.DictReader(file)]  # fmt: skip
        measures.append(sorted(map(str, lines)))
    assert len(measures[0]) == 16
    assert measures[0] == measures[1]
    analysis = summary(Path("shared"))["analysis"]
    assert len(analysis["tables"][0]["rows"]) == 8
    assert len(analysis["sentences"]) == 8
    assert "accuracy change" in Path("shared/report.html").read_text()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["sweep.shared_phases=training"], "sweep.shared_phases=training: there is no such phase"),
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
def test_a_sweep_waits_for_resources_when_its_only_node_is_lost(tmp_path):
    """A slot on one node, which is removed in the middle of trial 1; another one comes."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp", ignore_cleanup_errors=True) as short:
        script = Path(__file__).with_name("lost_node.py")
        done = subprocess.run(
            [sys.executable, str(script), *ARGUMENTS[:1], *ARGUMENTS[4:7],
             "cluster.workers=1", "cluster.threads=1", "sweep.slots=1", "sweep.trials=2",
             "sweep.pruner=none", "phases.train.fit.epochs=100", "logger=[csv]"],
            capture_output=True,
            text=True,
            env={
                **os.environ,
                "RAY_TMPDIR": short,
                "RAY_health_check_period_ms": "800",  # a lost node is known sooner
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
            },
            timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["state"] for row in rows()] == ["COMPLETE"] * 2
    told = (FOLDER / "log.txt").read_text()
    assert "it continues on another host" in told
    assert [told.count(f"trial {number}: accuracy") for number in range(2)] == [1] * 2
    assert [row["failures"] for row in rows()] == ["0"] * 2  # a lost host is no failure of a trial
    assert (tmp_path / "finished").read_text().split()
