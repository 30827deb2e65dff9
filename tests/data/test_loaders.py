"""Loader processes: long paths of temporary folders, signals, and the end of their parent."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import psutil
import pytest
import torch

from trainer.data.datasets import DatasetSplit
from trainer.data.loaders import _check_main_guard, _server, fork_server
from trainer.errors import ConfigError

READ = """
import multiprocessing, sys, tempfile
import torch
from trainer.data.datasets import DatasetSplit

if __name__ == "__main__":
    data = torch.utils.data.TensorDataset(torch.ones(3, 2), torch.tensor([0, 1, 2]))
    split = DatasetSplit(data, seed=0, loader_workers=1)
    ((_, targets),) = split.batches([torch.tensor([2, 0])], 0)
    print(targets.tolist(), multiprocessing.util.get_temp_dir().startswith(tempfile.gettempdir()))
"""


@pytest.mark.parametrize(
    ("source", "refused"),
    [
        ("check()", True),
        ("def start():\n    check()\n\nif True:\n    start(\n    )", True),
        ("import sys\nif len(sys.argv) and '__main__' == __name__:\n    check()", False),
        ("import multiprocessing as mp\nif not mp.parent_process():\n    check()", False),
        ("is_main = __name__ == '__main__'\nif is_main:\n    check()", False),
        ("def f():\n    if __name__ == '__main__':\n        check()\n\nf()", False),
    ],
)
def test_a_script_that_loader_processes_would_run_again_is_refused(
    source: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, main = tmp_path / "script.py", ModuleType("__main__")
    script.write_text(source)
    main.__file__ = str(script)
    vars(main)["check"] = _check_main_guard
    monkeypatch.setitem(sys.modules, "__main__", main)
    message = r"each loader process imports script.py, .* under `if __name__ == \"__main__\":`"
    with pytest.raises(ConfigError, match=message) if refused else nullcontext():
        exec(compile(source, str(script), "exec"), vars(main))
    del main.__file__  # as in a notebook
    exec(compile(source, str(script), "exec"), vars(main))


@pytest.mark.integration
@pytest.mark.parametrize("length", [50, 90])
def test_loader_processes_start_whatever_the_length_of_tmpdir(tmp_path: Path, length: int) -> None:
    """The path of a Unix socket has at most 107 bytes."""
    base = Path("/tmp") / f"loaders-{os.getpid()}"
    folder = base / ("x" * (length - len(str(base)) - 1))
    folder.mkdir(parents=True)
    script = tmp_path / "read.py"
    script.write_text(READ)
    try:
        done = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "TMPDIR": str(folder)},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
    finally:
        subprocess.run(["rm", "-r", str(base)], check=True)
    assert done.stdout.split() == ["[2,", "0]", str(length == 50)], done.stderr


COMMAND = """
import signal
numbers = {signal.SIGINT, signal.SIGTERM}
ignored = {n for n in numbers if signal.getsignal(n) is signal.SIG_IGN}
print(len(ignored | numbers & signal.pthread_sigmask(signal.SIG_BLOCK, [])))
"""


class Commands(torch.utils.data.Dataset):
    """Its targets: how many signals a command that it starts would ignore or block."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        command = [sys.executable, "-I", "-S", "-c", COMMAND]
        return torch.zeros(1), int(subprocess.check_output(command))


@pytest.mark.integration
def test_loader_processes_outlive_signals_and_are_killed_if_they_must_end():
    """A run that was asked to stop needs them up to its checkpoint."""
    split = DatasetSplit(Commands(), seed=0, loader_workers=1)
    targets = []
    for batch, (_, found) in enumerate(split.batches(torch.arange(4).split(1), 0)):
        targets += found.tolist()
        if batch == 1:
            (loader,) = split._loader._iterator._workers
            for process in (loader.pid, _server._forkserver_pid):
                os.kill(process, signal.SIGINT)
                os.kill(process, signal.SIGTERM)
    assert targets == [0] * 4
    assert loader.is_alive()
    loader.terminate()
    loader.join(10)
    assert loader.exitcode == -signal.SIGKILL


@pytest.mark.integration
def test_processes_of_other_code_can_be_terminated():
    """They must not inherit that the signals are blocked."""
    fork_server()
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(1000,))
    process.start()
    try:
        process.terminate()
        process.join(10)
        assert process.exitcode == -signal.SIGTERM
    finally:
        process.kill()


KILLED = """
import os, signal, time
import torch
from trainer.data.datasets import DatasetSplit
from trainer.data.loaders import _server

class Stuck(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        time.sleep(1000 * (index > 0))
        return torch.zeros(1), index

if __name__ == "__main__":
    split = DatasetSplit(Stuck(), seed=0, loader_workers=1)
    next(split.batches(torch.arange(3).split(1), 0))
    (loader,) = split._loader._iterator._workers
    print(loader.pid, _server._forkserver_pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.integration
def test_loader_processes_end_with_their_parent_even_if_they_are_stuck(tmp_path):
    script = tmp_path / "read.py"
    script.write_text(KILLED)
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL
    for pid in done.stdout.split():
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(int(pid))
            while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)  # within the time limit of the test
