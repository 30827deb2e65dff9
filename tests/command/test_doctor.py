"""trainer doctor: its findings, and the problems that it names."""

from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from trainer.__main__ import main
from trainer.command import doctor
from trainer.command.doctor import Finding, examine
from trainer.config import ClusterConfig

INLINE = ClusterConfig(workers=1, backend="inline", threads=1)


def findings(cfg: ClusterConfig, folder: Path) -> dict[str, Finding]:
    return {found.subject: found for found in examine(cfg, folder)}


def test_a_healthy_machine(tmp_path: Path) -> None:
    found = findings(INLINE, tmp_path)
    assert [f.subject for f in found.values() if f.level == "fails"] == []
    assert metadata.version("torch") in found["packages"].text
    assert "onnx" in found["extras"].text
    assert found["workers"].text.startswith("1 worker on ")


def test_what_would_fail_is_named(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK_GB", 1e9)
    needed = {"": [Requirement("torch<2"), Requirement("no-such-package")]}
    monkeypatch.setattr(doctor, "_requirements", lambda extra: needed.get(extra, []))
    found = list(examine(INLINE, tmp_path / "nowhere"))
    problems = {f.subject: f.text for f in found if f.level == "fails"}
    assert set(problems) == {"packages", "output", "temporary files"}
    assert "is installed, but <2 is needed" in problems["packages"]
    assert "no-such-package is not installed" in problems["packages"]
    assert "cannot be written to: No such file or directory" in problems["output"]
    lines: list[str] = []
    assert not doctor.doctor(INLINE, tmp_path, lines.append)
    assert lines[-1] == "a run would fail here"


def test_more_workers_than_cpus_is_a_note(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "available_cpus", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(doctor, "open_group", lambda cfg: doctor_group())
    found = findings(ClusterConfig(workers=4), tmp_path)
    assert found["CPUs"].level == "note"
    assert "4 workers would share them: set cluster.workers=2" in found["CPUs"].text


class doctor_group:
    """A group whose workers are there at once."""

    nodes = ("here", "here")

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass


def test_a_gpu_that_torch_cannot_use_is_a_note(monkeypatch, tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor, "_GPU_DEVICES", (str(tmp_path / "nvidia0"),))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found = findings(INLINE, tmp_path)["GPUs"]
    assert found.level == "note"
    assert "cannot use the GPU of this machine" in found.text


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["doctor", "cluster=inline"], 0, "a run would work here"),
        (["doctor", "seed=1"], 2, "only settings of cluster"),
        (["doctor", "cluster.wokers=1"], 2, "wokers"),
    ],
)
def test_the_command(arguments: list[str], code: int, text: str, capsys) -> None:
    assert main(arguments) == code
    assert text in "".join(capsys.readouterr())
