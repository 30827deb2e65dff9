"""A run in a notebook with a real kernel, as a front end without widgets shows it."""

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

CELL = """
from functools import partial

import trainer
from torch import nn
from trainer.phases import Prune, Train


class Net(nn.Sequential):
    def __init__(self, units):
        super().__init__(nn.Flatten(), nn.Linear(784, units), nn.ReLU(), nn.Linear(units, 10))


model = partial(Net, units=8)
data = trainer.data.mnist(train=64, validation=16)
phases = [Train(epochs=1), Prune(0.5)]
here = {"backend": "inline"}  # examples/ start workers from notebooks
trainer.run(model=model, data=data, phases=phases, artifact=True, cluster=here, out="r")
"""


@pytest.mark.integration
def test_a_run_shows_its_progress_and_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = notebook.cells[0].outputs
    streams = [output for output in outputs if output.output_type == "stream"]
    assert [output.text for output in streams if output.name == "stderr"] == []
    lines = "".join(output.text for output in streams)
    assert "prune done" in lines
    live, *_ = [output for output in outputs if output.output_type == "display_data"]
    assert live.data["text/html"] == ""  # the live display has ended
    shown = outputs[-1]
    assert shown.output_type == "execute_result"
    assert shown.data["text/plain"].startswith("Result(done: accuracy=")
    assert shown.data["text/html"].count("<svg") == 3
