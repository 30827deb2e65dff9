"""A host made of namespaces loses its power, returns, and gets notice to leave during a run."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import Dataset

from trainer.__main__ import main
from trainer.config.compose import conf_dir
from trainer.testing.hosts import Hosts, why_not

ROOT = conf_dir().parent
SLOW_S = 0.15
STEPS = 800
ARGUMENTS = [
    *("+experiment=lenet300", "data=dataset", "~data.shift", "data.loader_workers=0"),
    *("data.batch_size=2", f"phases.train.fit.max_steps={STEPS}", "cluster.workers=2"),
    *("cluster.threads=1", "checkpoint.every_steps=10"),
]


class Noise(Dataset[tuple[torch.Tensor, int]]):
    """Random images; reading one takes a while as long as a file does not exist."""

    def __init__(self, samples: int, file: str = "/") -> None:
        self._samples = samples
        self._file = Path(file)

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not self._file.exists():
            time.sleep(SLOW_S)
        return torch.randn(1, 28, 28), index % 10


def data(gate: Path) -> list[str]:
    target = f"_target_: {Noise.__module__}.Noise"
    return [
        f"data.train={{{target}, samples: {2 * STEPS}, file: {gate}}}",
        *(f"data.{part}={{{target}, samples: 20}}" for part in ("validation", "test")),
    ]


def wait_for(condition: Callable[[], bool], run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert run.poll() is None, Path("shown").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("shared_ray", "elsewhere")
def test_a_host_leaves_and_returns_without_a_repeated_step(monkeypatch):
    """It loses its power, returns, and is drained; a replay ends in the same bits."""
    if reason := why_not():
        pytest.skip(reason)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    gate = Path.cwd() / "gate"
    command = [sys.executable, "-m", "trainer", *ARGUMENTS, *data(gate)]
    elastic = ["cluster.min_workers=1", "cluster.address=auto", "hydra.run.dir=run"]
    with Hosts(2) as hosts, Path("shown").open("w") as shown:
        hosts.start_ray(1, 2)
        run = hosts.popen(1, *command, *elastic, stdout=shown, stderr=shown)
        folder = hosts.folder(1) / "run"

        def members() -> list[dict]:
            file = folder / "members.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            return [json.loads(line) for line in lines]

        def sizes() -> list[int]:
            return [one["workers"] for one in members()]

        wait_for(lambda: sizes() == [2] and bool(list(folder.glob("checkpoints/*step*"))), run)
        hosts.power_off(2)
        wait_for(lambda: sizes() == [2, 1], run)
        hosts.add(2)
        hosts.start_ray(2)
        wait_for(lambda: sizes() == [2, 1, 2], run)
        assert "h2" in members()[1]["reason"]
        hosts.drain(2)
        wait_for(lambda: sizes() == [2, 1, 2, 1], run)
        gate.touch()
        assert run.wait(120) == 0, Path("shown").read_text()
        summary = json.loads((folder / "summary.json").read_text())
        weights = (folder / "model.safetensors").read_bytes()
        (Path.cwd() / "members.jsonl").write_bytes((folder / "members.jsonl").read_bytes())
    assert (summary["status"], summary["restarts"]) == ("done", 0)
    replay = ["cluster.replay=members.jsonl", "cluster.cpus_per_worker=0.5", "hydra.run.dir=again"]
    assert main([*ARGUMENTS, *data(gate), *replay]) == 0
    assert Path("again/model.safetensors").read_bytes() == weights
