"""Loader processes, where the path of temporary folders is long."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
