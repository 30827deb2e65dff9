"""The lecture: its command runs what is missing and nothing twice; its exhibits show results."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.compose import compose_config
from trainer.experiment import Experiment
from trainer.lecture import EXHIBITS, Job, Results
from trainer.lecture import __main__ as command
from trainer.lecture.compression import LSTM
from trainer.lecture.page import page
from trainer.sweeps.analysis import Row

JOBS = {job.name: job for exhibit in EXHIBITS.values() for job in exhibit.jobs}


def test_equal_names_are_equal_jobs() -> None:
    assert all(JOBS[job.name] == job for e in EXHIBITS.values() for job in e.jobs)


@pytest.mark.parametrize("name", [n for n in JOBS if not n.endswith(("-1", "-2", "-l1"))])
def test_the_settings_of_jobs_are_valid(name: str) -> None:
    arguments = JOBS[name].arguments(short=True, cifar10=Path("cifar10"))
    Experiment.from_config(compose_config(arguments).plain())


class Stored(Results):
    """Results that were not run."""

    def summary(self, job: Job | str) -> dict[str, Any]:
        stages = [
            {"name": name, "bytes": 100, "ratio": ratio, "accuracy": 0.98, "loss": 0.1}
            for name, ratio in (("dense", 1.0), ("P+S", 31.0), ("P+S+H (Han's format)", 39.0))
        ]
        phases = [
            {"name": name, "accuracy": accuracy}
            for name, accuracy in (("train", 0.98), ("prune_50", 0.98), ("prune_90", 0.979))
        ]
        made = {"baseline_accuracy": 0.98, "accuracy": 0.97, "ratio": 99.0, "stages": stages}
        return {"status": "done", "artifact": made, "phases": phases, "seconds": 60}

    def rows(self, job: Job | str) -> list[Row]:
        return ROWS[job if isinstance(job, str) else job.name]


def layer(name: str, sparsity: float, epochs: int, accuracy: float) -> Row:
    settings = {"include": [name], "sparsity": sparsity, "fit.epochs": epochs}
    return Row({f"phases.prune.{k}": v for k, v in settings.items()}, {"accuracy": accuracy})


def methods(prune: bool, share: bool, accuracy: float, size: float) -> Row:
    settings = {"seed": 0, "phases.prune.enabled": prune, "phases.share.enabled": share}
    return Row(settings, {"accuracy": accuracy, "bytes": size})


def point(sparsity: float, accuracy: float, seed: int = 0, **more: float) -> Row:
    settings = {"seed": seed, "phases.prune.sparsity": sparsity, "phases.prune.fit.epochs": 0}
    bits, size = more.get("bits"), more.get("bytes", 0.0)
    epochs = {"phases.prune.fit.epochs": more.get("epochs", 0), "phases.share.bits": bits}
    return Row(settings | epochs, {"accuracy": accuracy, "bytes": size})


CURVE = [
    *(point(0.5, 0.98), point(0.5, 0.96, seed=1), point(0.9, 0.3), point(0.9, 0.2, seed=1)),
    *(point(0.5, 0.98, epochs=5), point(0.9, 0.97, epochs=5)),
]


def trial(precision: str, seed: int, accuracy: float) -> Row:
    return Row({"seed": seed, "precision": precision}, {"accuracy": accuracy})


PRECISIONS = [
    *(trial("fp32", 0, 0.6), trial("fp32", 1, 0.62), trial("bf16", 0, 0.61)),
    *(trial("bf16", 1, 0.63), trial("fp16", 0, 0.59), trial("fp16", 1, 0.6)),
]
ROWS = {
    **{f"precision-{name}": PRECISIONS for name in ("alexnet", "inception", "resnet")},
    **{"pruning-l1": CURVE, "pruning-l2": CURVE},
    "size-pruned": [point(0.9, 0.98, bytes=106644)],
    "size-shared": [point(0, 0.98, bits=4, bytes=106644), point(0, 0.96, 1, bits=4, bytes=106644)],
    "size-both": [point(0.9, 0.97, bytes=26661)],
    "sensitivity": [
        layer("fc1", 0, 0, 0.98),
        layer("fc1", 0.9, 0, 0.5),
        layer("fc1", 0.9, 1, 0.98),
    ],
    "interference": [
        *(methods(False, False, 0.98, 900), methods(True, False, 0.97, 90)),
        *(methods(False, True, 0.98, 100), methods(True, True, 0.96, 10)),
    ],
}


def text_of(name: str, results: Results) -> str:
    """The page with one exhibit."""
    only = {name: EXHIBITS[name]}
    return page(only, results, short=False, cifar10=None, command="c", failed={}, date="today")


def test_deep_compression_beside_the_published_values(tmp_path: Path) -> None:
    text = text_of("deep-compression", Stored(tmp_path))
    for cell in ("2.00", "31x", "39x", "3.00 ± 0.00", "99x", "1.58", "49x"):
        assert f">{cell}</td>" in text, cell


def test_perplexity_of_the_lstm(tmp_path: Path) -> None:
    assert ">1.105</td>" in text_of("lstm", Stored(tmp_path))  # e^0.1


def test_precisions_beside_fp32(tmp_path: Path) -> None:
    text = text_of("precision", Stored(tmp_path))
    for cell in ("61.00 ± 1.41", "62.00 ± 1.41", "59.50 ± 0.71"):
        assert f">{cell}</td>" in text, cell
    assert "AlexNet-like, bf16: +1.00 ± 0.00 points from fp32 on the same seeds, a signif" in text
    assert "AlexNet-like, fp16: -1.50 ± 0.71 points from fp32 on the same seeds, no signif" in text


def test_the_images_of_cifar10_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), "--only"]
    assert command.main([*out, "precision"]) == 2
    assert "give --cifar10 DIR" in capsys.readouterr().err
    assert command.main([*out, "precision", "--cifar10", str(tmp_path)]) == 2
    assert "there is no train.zip" in capsys.readouterr().err
    (tmp_path / "train.zip").touch()
    assert command.main([*out, "precision", "--cifar10", str(tmp_path)]) == 2
    assert "there is no test.zip" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_curves_of_pruning(tmp_path: Path) -> None:
    text = text_of("pruning", Stored(tmp_path))
    for cell in ("none", "50% (2.0x)", "90% (10.0x)", "25.00 ± 7.07", "97.90 ± 0.00"):
        assert f">{cell}</td>" in text, cell
    assert text.count("<svg") == 1


def test_curves_of_sizes(tmp_path: Path) -> None:
    text = text_of("size", Stored(tmp_path))
    for cell in ("4 bits", "90% sparse", "10.0x", "40.0x", "97.00 ± 1.41"):
        assert f">{cell}</td>" in text, cell


def test_speed_up_of_parallel_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(_: Results, job: Job) -> dict[str, Any]:
        return {"status": "done", "seconds": 100 / int(job.name.split("-")[1])}

    monkeypatch.setattr(Stored, "summary", summary)
    text = text_of("parallel", Stored(tmp_path))
    assert ">2.00 to 2.00</td>" in text


def test_bytes_of_the_ring(tmp_path: Path) -> None:
    row = {"ranks": 3, "payload": 3e6, "sent": 4e6, "bound": 4e6, "n": 15}
    times = {"ring": 2.0, "gloo": 3.0, "link": 1.6}
    results = Results(tmp_path)
    results.keep("ring", [row | times])
    text = text_of("ring", results)
    assert ">1.0000</td>" in text
    assert ">1.25</td>" in text


def test_sweeps_are_shown_by_their_analyses(tmp_path: Path) -> None:
    text = text_of("sensitivity", Stored(tmp_path))
    assert ">90.0%</td>" in text
    assert ">26%</td>" in text
    assert "<svg" in text
    assert "-2.00 points" in text_of("interference", Stored(tmp_path))


def test_huffman_needs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path), "--only", "huffman"]) == 0
    text = (tmp_path / "lecture.html").read_text()
    assert ">55</td>" in text
    assert "Not run yet: python -m trainer.lecture --only eie" in text
    assert "0 of 1 exhibits to run" in capsys.readouterr().out


def test_a_name_that_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "huffmann"]) == 2
    assert "it must be one of" in capsys.readouterr().err


def test_settings_that_no_run_has_are_refused_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["huffman", "--out", str(tmp_path), "--only", "lstm"]) == 2
    assert "huffman: it is not of the form key=value" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would run, each of which leaves a summary."""
    commands: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        commands.append(arguments)
        folder = Path(arguments[-1].removeprefix("hydra.run.dir=").removeprefix("resume="))
        folder.mkdir(parents=True, exist_ok=True)
        if len(commands) == 1:  # interrupted
            (folder / "config.yaml").touch()
            return 130
        (folder / "summary.json").write_text(json.dumps(Stored(folder).summary(LSTM)))
        return 0

    monkeypatch.setattr(command, "run_command", run)
    return commands


def test_an_interrupted_run_continues_and_a_finished_one_is_not_repeated(
    tmp_path: Path, runs: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--short", "--out", str(tmp_path), "--only", "lstm", "seed=3"]
    assert command.main(arguments) == 130
    assert runs[0][0] == "+experiment=lstm_text"
    assert runs[0][-2:] == ["seed=3", f"hydra.run.dir={tmp_path}/runs/lstm"]
    assert "the same command continues" in capsys.readouterr().err
    assert command.main(arguments) == 0
    assert runs[1] == [f"resume={tmp_path}/runs/lstm"]
    assert command.main(arguments) == 0
    assert len(runs) == 2
    (tmp_path / "runs" / "lstm" / "summary.json").unlink()
    assert command.main([*arguments[:-1], "seed=4"]) == 2
    assert "lstm has other settings there" in capsys.readouterr().err
    assert command.main([*arguments[1:-1], "seed=3"]) == 2
    assert "has the results of the short version" in capsys.readouterr().err
    (tmp_path / "runs.json").write_text("{")
    assert command.main(arguments) == 2
    assert "runs.json is damaged: delete it" in capsys.readouterr().err


def test_the_settings_of_trials_are_those_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "runs" / "tried").mkdir(parents=True)
    (tmp_path / "runs" / "tried" / "trials.csv").write_text(
        "number,state,epochs,accuracy,seed,precision,phases.prune.sparsity,kwh,failures,reason\n"
        "0,COMPLETE,2,0.9,3,bf16,0.5,0.001,0,\n1,FAILED,,,4,fp32,0.5,,3,lost\n"
    )
    (row,) = Results(tmp_path).rows("tried")
    assert row.settings == {"seed": 3, "precision": "bf16", "phases.prune.sparsity": 0.5}
    assert row.measured == {"accuracy": 0.9}


def test_a_failed_measurement_is_shown_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("of another process")

    monkeypatch.setitem(EXHIBITS, "tpu", dataclasses.replace(EXHIBITS["tpu"], measure=fails))
    arguments = ["--short", "--out", str(tmp_path), "--only", "tpu,huffman"]
    assert command.main(arguments) == 1
    text = (tmp_path / "lecture.html").read_text()
    assert "the measurement failed: of another process" in text
    assert "72 bits" in text


def test_a_failed_run_is_shown_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_command", lambda arguments: 1)
    arguments = ["--short", "--out", str(tmp_path), "--only", "lstm,tpu"]
    assert command.main(arguments) == 1
    assert "failed: lstm" in capsys.readouterr().err
    assert "the run lstm ended with exit code 1" in (tmp_path / "lecture.html").read_text()
    measured = json.loads((tmp_path / "measured" / "tpu.json").read_text())
    assert measured[0]["title"] == "TPU: closed forms"


@pytest.mark.slow
def test_an_exhibit_is_run(tmp_path: Path) -> None:
    assert command.main(["--short", "--out", str(tmp_path), "--only", "distributions"]) == 0
    text = (tmp_path / "lecture.html").read_text()
    assert "<figcaption>fc1.weight</figcaption>" in text
    assert "phases.share.bits=6" in text
