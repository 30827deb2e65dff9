"""The command: lists, refused arguments, exit codes and files."""

import functools
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.exporter import exporter_reads_its_operators_once  # noqa: F401 - a fixture
from trainer import artifact
from trainer.__main__ import _exit, main
from trainer.compress.quantize import is_quantizer_entry
from trainer.config.compose import compose_config, conf_dir
from trainer.data.idx import mnist
from trainer.models import LeNet5, LeNet300
from trainer.store.directory import RunDirectory

FILES = sorted((conf_dir() / "experiment").glob("*.yaml"))
EXPERIMENTS = [file.stem for file in FILES]
SWEEPS = [file.stem for file in FILES if "sweep" in yaml.safe_load(file.read_text())]

# What makes any shipped experiment small: one inline worker, a few steps of each phase.
TINY = [
    "cluster=inline",
    "hydra.run.dir=run",
    "cluster.threads=1",
]


pytestmark = pytest.mark.usefixtures("elsewhere", "charts_not_drawn")


@functools.cache
def composed_settings(*overrides):
    return compose_config(overrides).plain()


def shrunk(name):
    """Overrides that let experiment `name` end in seconds, every phase included."""
    composed = composed_settings("+experiment=" + name)
    overrides = [f"+experiment={name}", *TINY]
    for phase, settings in composed["phases"].items():
        if settings["fit"]["epochs"]:
            overrides += [f"phases.{phase}.fit.epochs=1", f"phases.{phase}.fit.max_steps=3"]
    if composed["sweep"]["params"]:
        overrides += ["sweep.trials=2", "sweep.slots=1"]
        if composed["sweep"]["constraints"]:  # a net that was trained so little would miss it
            overrides += ["sweep.constraints={accuracy: '>= 0'}"]
        if composed["sweep"]["trial_overrides"]:
            overrides += ["sweep.trial_overrides={data.train: 200, phases.train.fit.epochs: 1}"]
    if composed["limits"]["max_accuracy_drop"] is not None:
        overrides += ["limits.max_accuracy_drop=1"]  # 100 samples say nothing of it
    if composed["data"]["batch_size"] > 64:  # several batches of the 200 samples
        overrides += ["data.batch_size=64"]
    if composed["data"]["_target_"].endswith("mnist"):
        overrides += ["data.train=200", "data.validation=100", "data.test=100"]
    else:
        Path("short.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
        overrides += ["data.path=short.txt", "data.context=16"]
    return overrides, composed


def test_alone_it_lists_the_experiments_and_how_to_start_one(capsys):
    assert main([]) == 2
    said = capsys.readouterr().out
    assert "python -m trainer +experiment=NAME" in said
    for name in EXPERIMENTS:
        (line,) = [line for line in said.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 3


def test_a_working_directory_that_was_deleted(tmp_path, capsys):
    folder = tmp_path / "gone"
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    try:
        assert main(["+experiment=smoke", "cluster=inline"]) == 2
        assert main(["--list"]) == 2
    finally:
        os.chdir(tmp_path)
    message = "wrong configuration: the working directory no longer exists: cd to another one\n"
    assert capsys.readouterr().err == 2 * message


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["+experiment=nonsense"], ["experiment/nonsense", "smoke"]),
        (["+experiment=smoke", "sed=1"], ["sed"]),
        (["+experiment=smoke", "seed=one"], ["seed=one: it must be a whole number"]),
        (["+experiment=smoke", "precision=fp8"], ["precision/fp8", "bf16"]),
        (["+experiment=smoke", "cluster.workers=0"], ["cluster.workers=0"]),
        (["+experiment=smoke", "cluster.wokers=1"], ["wokers"]),
        (["+experiment=smoke", "phases.prune.sparsity=1"], ["phases.prune", "sparsity=1"]),
        (["+experiment=smoke", "phases.prune.sparsity=-0.1"], ["sparsity=-0.1"]),
        (["+experiment=smoke", "phases.train.fit.epochs=-1"], ["phases.train.fit", "epochs=-1"]),
        (["+experiment=smoke", "+phases.train.sparsity=0.5"], ["phases.train.sparsity"]),
        (["+experiment=smoke", "optimizer.lr=-1"], ["optimizer.lr=-1"]),
        (["+experiment=smoke", "optimizer._target_=torch.optim.None"], ["optimizer._target_"]),
        (["+experiment=smoke", "model._target_=no.such.Net"], ["model._target_=no.such.Net"]),
        (["+experiment=smoke", "+model.depth=3"], ["model.depth", "classes"]),
        (["+experiment=smoke", "data._target_=trainer.data.none"], ["data._target_"]),
        (["+experiment=smoke", "data.batch_size=1"], ["data.batch_size=1", "cluster.workers=2"]),
        (["+experiment=smoke", "data.batch_size=0"], ["data.batch_size=0"]),
        (["+experiment=smoke", "cluster.backend=inline"], ["cluster.workers=2", "inline"]),
        (["+experiment=smoke", "cluster=inline", "cluster.nice=5"], ["cluster.nice=5", "ray"]),
        (["+experiment=smoke", "cluster=inline", "cluster.address=auto"], ["cluster.address=auto"]),
        (["+experiment=smoke", "model.classes=9"], ["target is 9", "the model has 9 outputs"]),
        (["+experiment=smoke", "model=resnet_cifar"], ["[1, 28, 28]", "ResNetCifar"]),
        (["+experiment=lstm_text", "model.vocabulary=90"], ["train sample", "90 outputs"]),
        (["+experiment=smoke", "+phases.prune.overrides.conv9=0.5"], ["conv9", "conv1.weight"]),
        (["name=bare"], ["phases", "none"]),
        (["seed=1"], ["name"]),
        (["+experiment=smoke", "--config-dir", "nowhere"], ["nowhere"]),
        (["--config-dir", "nowhere"], ["--config-dir=nowhere"]),
        (["+experiment=smoke", f"name={'x' * 300}"], ["File name too long", "hydra.run.dir"]),
        (["+experiment=smoke", "--config-dir", "x" * 300], ["--config-dir=xxx", "no such folder"]),
        (["+experiment=smoke", f"init_from={'x' * 300}"], ["init_from=xxx", "File name too long"]),
        (["+experiment=smoke", "name=caf\udce9"], ["name=caf", "cannot be read"]),
        (["+experiment=smoke", "=="], ["=="]),
    ],
)
@pytest.mark.slow
def test_a_wrong_configuration_ends_in_one_line_and_leaves_nothing(
    arguments, said, capsys, tmp_path
):
    extra = [] if any("cluster" in a or "batch" in a for a in arguments) else ["cluster=inline"]
    assert main([*arguments, *extra]) == 2
    message = capsys.readouterr().err
    assert message.startswith("wrong configuration: ")
    assert message.count("\n") == 1
    for part in said:
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_data_that_cannot_be_read_is_a_wrong_configuration(capsys, tmp_path):
    assert main(["+experiment=smoke", "data.root=/no/where", *TINY]) == 2
    assert "/no/where" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SWEEPS)
@pytest.mark.slow
def test_every_shipped_sweep_runs(name, capsys):
    overrides, composed = shrunk(name)
    assert main(overrides) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["trials"] == {"complete": 2, "pruned": 0, "failed": 0, "unfinished": 0}
    assert len(Path("run/trials.csv").read_text().splitlines()) == 3
    report = Path("run/report.html").read_text()
    assert "Importance of parameters" in report
    assert "<script src=" not in report  # it needs no other file, and no network
    assert ("Pareto front" in report) == (len(summary["objectives"]) > 1)
    assert not Path("run/trials").exists()  # the checkpoints of trials that ended
    command = shlex.split(summary["best"][0]["command"])
    capsys.readouterr()
    assert main([*command[3:], "--cfg"]) == 0
    again = yaml.safe_load(capsys.readouterr().out)
    for key, value in summary["best"][0]["params"].items():
        if ".".join(key.split(".")[:-1]) not in composed["sweep"]["lengths"]:
            found = again
            for part in key.split("."):
                found = found[part]
            assert str(found) == str(value)
    if composed["sweep"]["refit"]:
        best = json.loads(Path("run/best/summary.json").read_text())
        assert best["status"] == "done"
        assert Path("run/best/model.safetensors").exists()


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name not in SWEEPS])
@pytest.mark.slow
def test_every_shipped_experiment_runs(name):
    overrides, composed = shrunk(name)
    assert main(overrides) == 0
    run = Path("run")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["error"] is None
    assert [p["name"] for p in summary["phases"]] == list(composed["phases"])
    assert 0 <= summary["accuracy"] <= 1
    for phase in summary["phases"]:
        expected = 3 if composed["phases"][phase["name"]]["fit"]["epochs"] else 0
        assert phase["steps"] == expected * max(1, len(phase["rounds"]))
        assert phase["sent_bytes_per_step"] == 0
    assert len(list((run / "checkpoints").iterdir())) == len(summary["phases"])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [p for p in summary["phases"] if p["steps"]]
    told = [p["name"] for p in trained for _ in range(max(1, len(p["rounds"])))]
    assert [line["phase"] for line in lines] == told
    assert list((run / "tensorboard").iterdir())
    assert composed["name"] in (run / "report.html").read_text()
    assert not (run / ".hydra").exists()
    assert not list(run.glob("**/*.part"))
    saved = load_file(run / "model.safetensors")
    weights = {name: value for name, value in saved.items() if not is_quantizer_entry(name)}
    zeros = sum(int((value == 0).sum()) for value in weights.values())
    nonzero = sum(value.numel() for value in weights.values()) - zeros
    assert nonzero == summary["phases"][-1]["nonzero"]
    if composed["export"]["onnx"]:
        quantized = len(weights) < len(saved)
        exported = summary["onnx"]
        assert [row["name"] for row in exported] == (["fp32", "int8"] if quantized else ["fp32"])
        assert exported[-1]["file_bytes"] == (run / "model.onnx").stat().st_size
        if quantized:
            assert exported[1]["file_bytes"] < 0.35 * exported[0]["file_bytes"]
        for told in exported:  # of 100 samples, in onnxruntime and in PyTorch
            assert abs(told["accuracy"] - told["torch_accuracy"]) <= 0.02
    else:
        assert not (run / "model.onnx").exists()


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_is_refused_before_training(capsys, tmp_path):
    (tmp_path / "odd.py").write_text(
        "from trainer.models import LeNet300\n"
        "class Net(LeNet300):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x if x.sum() > 0 else -x)\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        overrides, _ = shrunk("lenet300")
        assert main([*overrides, "export.onnx=true", "model._target_=odd.Net"]) == 2
    finally:
        sys.path.remove(str(tmp_path))
    assert "export.onnx=true: Net cannot be exported to ONNX" in capsys.readouterr().err
    assert not Path("run").exists()


@pytest.mark.slow
def test_the_model_file_loads_into_the_plain_class_and_the_config_runs_again():
    overrides, _ = shrunk("prune_lenet300")
    assert main(overrides) == 0
    model = LeNet300()
    model.load_state_dict(load_file("run/model.safetensors"))
    assert (model.fc1.weight == 0).double().mean() > 0.9
    saved = yaml.safe_load(Path("run/config.yaml").read_text())
    assert saved["phases"]["prune"]["sparsity"] == 0.92
    assert main([*overrides, "hydra.run.dir=run"]) == 0  # a name already taken gets a suffix
    again = load_file("run-2/model.safetensors")
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["+experiment=smoke", "--cfg"], 0),
        (
            [
                "+experiment=lenet300",
                *TINY,
                *("phases.train.fit.epochs=1", "phases.train.fit.max_steps=3"),
                *("data.train=200", "data.validation=100", "data.test=100"),
            ],
            0,
        ),
    ],
    ids=["list", "cfg", "run"],
)
@pytest.mark.slow
def test_a_reader_that_goes_away_ends_nothing(arguments, code):
    """As in `python -m trainer ... | head`: here nobody reads at all."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "trainer", *arguments], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (code, b"")


@pytest.mark.slow
def test_smoke_ends_in_a_file_that_decodes_to_what_was_measured():
    overrides, _ = shrunk("smoke")
    assert main([*overrides, "precision=fp32"]) == 0
    summary = json.loads(Path("run/summary.json").read_text())
    found = summary["artifact"]
    keys = "path bytes dense_bytes ratio accuracy loss baseline_accuracy stages layers frame_bytes"
    assert set(found) >= set(keys.split())
    assert set(found["layers"][0]) >= {"name", "weights", "nonzero", "bits", "bytes"}
    assert [stage["name"] for stage in found["stages"]][:3] == ["dense", "P", "P+S"]
    content = Path("run/model.dcz").read_bytes()
    assert found["bytes"] == len(content)
    assert found["dense_bytes"] == 4 * 431_080
    assert found["ratio"] == pytest.approx(found["dense_bytes"] / found["bytes"])
    assert found["stages"][0]["ratio"] == 1.0
    assert (found["stages"][0]["loss"], found["stages"][-1]["loss"]) == (
        summary["baseline_loss"],
        found["loss"],
    )
    assert sum(layer["bytes"] for layer in found["layers"]) + found["frame_bytes"] == len(content)
    model = LeNet5()
    model.load_state_dict(artifact.load("run/model.dcz"))
    test = mnist(seed=0, train=200, validation=100, test=100).test
    ((inputs, targets),) = test.batches([torch.arange(100)], None)
    correct = (model.eval()(inputs).argmax(1) == targets).double().mean()
    assert float(correct) == pytest.approx(found["accuracy"])
    trained = load_file("run/model.safetensors")
    assert all((trained[k] == 0).equal(v == 0) for k, v in artifact.load("run/model.dcz").items())


@pytest.mark.slow
def test_a_missed_limit_is_exit_code_3_and_other_limits_can_be_applied(capsys):
    overrides, _ = shrunk("smoke")
    assert main([*overrides, "limits.min_ratio=1e6"]) == 3
    assert "limits.min_ratio=1e+06" in capsys.readouterr().err
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["status"] == "limits"
    assert "min_ratio" in summary["error"]
    assert main(["resume=run", "limits.min_ratio=1"]) == 0
    assert json.loads(Path("run/summary.json").read_text())["status"] == "done"
    assert main(["resume=run", "limits.max_megabytes=0.000001"]) == 3


@pytest.mark.slow
def test_a_limit_on_the_drop_of_a_finished_run_needs_a_dense_model(capsys):
    composed = composed_settings("+experiment=prune_lenet300", "~phases.train")
    directory = RunDirectory.claim(Path("run"))
    directory.write_config(composed)
    directory.write_summary({"status": "done", "accuracy": 0.9, "baseline_accuracy": None})
    capsys.readouterr()
    assert main(["resume=run", "limits.max_accuracy_drop=0.1"]) == 2
    assert "there is no dense model" in capsys.readouterr().err


@pytest.mark.slow
def test_any_weights_can_be_compressed_without_training(monkeypatch):
    def write_another(directory, content):
        """The same weights, but not the same bytes."""
        (directory.path / "model.dcz").write_bytes(artifact.encode(artifact.loads(content)))

    monkeypatch.setattr(RunDirectory, "write_artifact", write_another)
    torch.manual_seed(1)
    begin = LeNet300()
    torch.save(begin.state_dict(), "mine.pt")
    overrides, _ = shrunk("deep_compression_lenet300")
    untrained = [o for o in overrides if ".fit." not in o]
    phases = ["~phases.train", "~phases.retrain", "phases.prune.schedule=oneshot"]
    phases += ["phases.prune.fit.epochs=0", "phases.share.fit.epochs=0"]
    assert main([*untrained, *phases, "init_from=mine.pt"]) == 0
    found = json.loads(Path("run/summary.json").read_text())["artifact"]
    assert found["bytes"] == Path("run/model.dcz").stat().st_size  # what is there counts
    state = artifact.load("run/model.dcz")
    assert int(state["fc1.weight"].count_nonzero()) == round(0.02 * 300 * 784)
    assert state["fc1.weight"][state["fc1.weight"] != 0].unique().numel() <= 8
    largest = begin.fc1.weight.detach().abs().flatten().topk(round(0.02 * 300 * 784)).indices
    assert state["fc1.weight"].flatten()[largest].all()


@pytest.mark.slow
def test_a_failing_worker_leaves_summary_and_traceback(capsys, tmp_path):
    (tmp_path / "broken.py").write_text(
        "from trainer.models import LeNet300\n"
        "class Net(LeNet300):\n"
        "    def forward(self, x):\n"
        "        raise ArithmeticError('out of order')\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        overrides, _ = shrunk("lenet300")
        assert main([*overrides, "model._target_=broken.Net"]) == 1
    finally:
        sys.path.remove(str(tmp_path))
    shown, said = capsys.readouterr()
    assert "not restarting: the same error occurred twice at the same step" in shown
    assert "worker 0 on" in said
    assert "ArithmeticError: out of order" in said
    assert said.count("\n") == 1
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["status"] == "failed"
    assert "out of order" in summary["error"]
    assert "raise ArithmeticError('out of order')" in Path("run/log.txt").read_text()


@pytest.mark.slow
def test_own_experiments_live_in_a_folder_of_their_own(tmp_path, capsys):
    folder = tmp_path / "my conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "# @package _global_\n# My own\ndefaults:\n  - lenet300\n  - _self_\nname: mine\nseed: 7\n"
    )
    assert main(["+experiment=mine", "--config-dir", "my conf", "--cfg"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7
    assert main(["--config-dir", "my conf"]) == 2
    assert "My own" in capsys.readouterr().out


def test_no_cluster_at_the_address(monkeypatch, capsys):
    """This process may be connected to the Ray of other tests, which must not be noticed here."""
    from trainer.cluster import connection

    calls = {"is_initialized": lambda: False, "shutdown": lambda: None}
    monkeypatch.setattr(connection, "ray", SimpleNamespace(**calls))
    monkeypatch.setattr(connection.RayConnection, "_head", None)
    assert main(["+experiment=smoke", "cluster.address=127.0.0.1:1", "hydra.run.dir=run"]) == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err


def test_the_command_answers_before_slow_libraries_are_imported():
    """Help, completion and most mistakes need none of them."""
    code = "import sys, trainer.__main__; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "trainer.driver.run" in imported
    assert not imported & {"torch", "ray", "optuna", "matplotlib", "numba", "pandas"}


def test_the_exit_code_survives_closed_streams(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    _exit(3)
    assert codes == [3]
