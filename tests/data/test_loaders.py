"""Loader processes, where the path of temporary folders is long."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from trainer.data.loaders import _check_main_guard
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
        ("if __name__ == '__main__':\n    print()\ncheck()", True),
        ("import sys\nif len(sys.argv) and '__main__' == __name__:\n    check()", False),
        ("import multiprocessing as mp\nif not mp.parent_process():\n    check()", False),
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
