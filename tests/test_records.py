"""records/: every recorded file is there, is what the table says, and decodes to its model."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer import artifact
from trainer.config.compose import conf_dir
from trainer.config.instantiate import build_object

RECORDS = conf_dir().parent / "records"


@pytest.fixture(scope="module")
def verify() -> Any:
    spec = importlib.util.spec_from_file_location("verify", RECORDS / "verify.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["verify"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


def test_files_are_as_recorded(verify: Any) -> None:
    runs = verify.runs()
    assert runs
    for run in runs:
        assert verify.problems(run) == []
        model = build_object("model", {"_target_": run.model}, torch.nn.Module)
        model.load_state_dict(artifact.load(run.path))


def test_the_table_has_the_figures_of_each_record(verify: Any) -> None:
    table = (RECORDS / "README.md").read_text()
    for run in verify.runs():
        assert f"{run.bytes:,}" in table, run
        assert f"{run.errors / 100:.2f}" in table, run


def test_a_changed_file_is_found(verify: Any, tmp_path: Path) -> None:
    run = verify.runs()[0]
    changed = tmp_path / "model.dcz"
    changed.write_bytes(run.path.read_bytes() + b"\0")
    values = {**vars(run), "path": changed}
    assert verify.problems(verify.Run(**values)) == [f"{run.bytes + 1} bytes", "another SHA-256"]


def test_an_unknown_name_is_refused(verify: Any) -> None:
    with pytest.raises(SystemExit, match="no record is called lenet7"):
        verify.runs(["lenet7"])
