"""The pages for one's own model and data: their code works, and their commands are right."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.test_main import capture
from trainer.config.compose import conf_dir
from trainer.engine.world import World
from trainer.experiment import Experiment
from trainer.messages import PhaseEnded
from trainer.worker.preflight import check_compatible
from trainer.worker.run import Start, run_phases

DOCS = conf_dir().parent / "docs"
BLOCK = re.compile(r"```(?:python|yaml)\n(.*?)```", re.DOTALL)
FILE = re.compile(r"`([\w/]+\.(?:py|yaml))`")
COMMAND = re.compile(r"^    python -m trainer ((?:.*\\\n)*.*)", re.MULTILINE)


@pytest.fixture
def written(request, tmp_path, monkeypatch):
    """The text of a page, whose files are in the working directory, and can be imported."""
    text = (DOCS / request.param).read_text()
    for block in BLOCK.finditer(text):
        if names := FILE.findall(text[: block.start()]):  # the last one before a block is its own
            path = tmp_path / names[-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a") as file:
                file.write(block[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield text
    for path in Path.cwd().glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.parametrize("written", ["own-model.md", "own-data.md"], indirect=True)
@pytest.mark.slow
def test_the_commands_of_a_page_run_as_it_says(written):
    commands = COMMAND.findall(written)
    assert len(commands) >= 2
    world = World.single(torch.device("cpu"))
    for command in commands:
        arguments = shlex.split(command.replace("\\\n", " "))
        found = Experiment.from_config(yaml.safe_load(capture([*arguments, "--cfg"])))
        found.check_model()
        check_compatible(found.build_model(), found.build_data(), found.build_runtime(world))


@pytest.mark.integration
@pytest.mark.parametrize("written", ["own-data.md"], indirect=True)
def test_the_examples_of_a_page_learn(written):
    """Sixty steps suffice to see it."""
    for command in COMMAND.findall(written):
        arguments = shlex.split(command.replace("\\\n", " "))
        arguments += ["phases.train.fit.epochs=1", "phases.train.fit.max_steps=60"]
        found = Experiment.from_config(yaml.safe_load(capture([*arguments, "--cfg"])))
        messages = run_phases(World.single(torch.device("cpu")), found, Start(0))
        (record,) = (message.record for message in messages if isinstance(message, PhaseEnded))
        assert record.steps > 30
        assert record.accuracy > 0.5, command  # chance is 0.1
