"""The pages for classes of one's own: their code works and learns, their commands are right."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import trainer
from tests.experiments import printed
from trainer.config.compose import conf_dir
from trainer.engine.world import World
from trainer.experiment import Experiment, check_model, initial_weights
from trainer.messages import PhaseEnded
from trainer.phases import Prune, Quantize, Train
from trainer.store.serialization import from_bytes
from trainer.worker.preflight import check_compatible
from trainer.worker.run import Start, run_phases

DOCS = conf_dir().parent / "docs"
BLOCK = re.compile(r"```(?:python|yaml)\n(.*?)```", re.DOTALL)
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
FILE = re.compile(r"`([\w/]+\.(?:py|yaml))`")
COMMAND = re.compile(r"^    python -m trainer ((?:.*\\\n)*.*)", re.MULTILINE)
OF_THE_READER = "+experiment=mine"  # stands for an experiment that no page shows


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


def _commands(page):
    return [command for command in COMMAND.findall(page) if OF_THE_READER not in command]


@pytest.mark.parametrize("written", ["own-model.md", "own-data.md"], indirect=True)
@pytest.mark.slow
def test_the_commands_of_a_page_run(written):
    commands = _commands(written)
    assert len(commands) >= 2
    world = World.single(torch.device("cpu"))
    for command in commands:
        arguments = shlex.split(command.replace("\\\n", " "))
        found = Experiment.from_config(printed(*arguments))
        check_model(found)
        check_compatible(found.build_model(), found.build_data(), found.build_runtime(world))


@pytest.mark.integration
@pytest.mark.parametrize("written", ["own-model.md", "own-data.md"], indirect=True)
def test_the_examples_of_a_page_learn(written):
    """Sixty steps suffice to see it."""
    for command in _commands(written):
        arguments = shlex.split(command.replace("\\\n", " "))
        arguments += ["phases.train.fit.epochs=1", "phases.train.fit.max_steps=60"]
        found = Experiment.from_config(printed(*arguments))
        messages = run_phases(World.single(torch.device("cpu")), found, Start(0))
        (record,) = (message.record for message in messages if isinstance(message, PhaseEnded))
        assert record.steps > 30
        assert record.accuracy > 0.5, command  # chance is 0.1


@pytest.mark.parametrize("written", ["tutorial-images.md"], indirect=True)
def test_the_tutorial_for_images_starts(written):
    """With a network of this package instead of timm's, which has to be downloaded."""
    pillow = pytest.importorskip("PIL.Image")
    for part, n in (("train", 4), ("test", 1)):
        for name in "abcde":
            folder = Path("photos") / part / name
            folder.mkdir(parents=True)
            for number in range(n):
                pillow.new("RGB", (32, 32), color=(ord(name), number, 0)).save(
                    folder / f"{number}.png"
                )
    network = Path("myconf/model/resnet10t.yaml")
    network.write_text("_target_: trainer.models.ResNetCifar\ndepth: 8\nclasses: 5\n")
    torch.manual_seed(0)
    given = trainer.models.ResNetCifar(depth=8, classes=10).state_dict()
    save_file(given, "pretrained.safetensors")
    (command,) = _commands(written)
    found = Experiment.from_config(printed(*shlex.split(command)))
    check_model(found)
    model, data = found.build_model(), found.build_data()
    assert [len(split) for split in vars(data).values()] == [18, 2, 5]
    runtime = found.build_runtime(World.single(torch.device("cpu")))
    check_compatible(model, data, runtime, [phase.fit for phase in found.phases.values()])
    weights, _ = from_bytes(initial_weights(found, model))
    assert torch.equal(weights["conv.weight"], given["conv.weight"])


@pytest.mark.slow
@pytest.mark.usefixtures("elsewhere")
def test_the_examples_of_phase_layer_coder_and_sink_work_in_one_run(monkeypatch):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    for page in ("own-phase.md", "own-layer.md", "own-coder.md", "own-sink.md"):
        text = (DOCS / page).read_text()
        block = PYTHON.search(text)
        Path(FILE.findall(text[: block.start()])[-1]).write_text(block[1])
    noise, lowrank, packed, notify = map(
        importlib.import_module, ("noise", "lowrank", "packed", "notify")
    )
    torch.manual_seed(0)
    layers = (lowrank.LowRank(784, 64, rank=16), nn.ReLU(), nn.Linear(64, 10))
    result = trainer.run(
        model=nn.Sequential(nn.Flatten(), *layers),
        data=trainer.data.mnist(train=2000, validation=500, test=500),
        phases=[
            Train(epochs=3),
            Prune(0.5),
            noise.Shake(epochs=1),
            Quantize(layers=[lowrank.LowRank], keep=["zeros"], epochs=1),
        ],
        lr=0.05,
        workers=1,
        cluster={"backend": "inline", "threads": 1},
        artifact={"make": True, "coder": packed.Lzma()},
        logger={"accuracies": notify.AccuracyFile(".")},
        out="run",
        progress=False,
    )
    assert result.metrics["accuracy"] > 0.6  # chance is 0.1
    assert [phase["sparsity"] > 0.4 for phase in result.phases] == [False, True, True, True]
    lines = Path("accuracy.txt").read_text().splitlines()
    assert [float(line.split()[1]) > 0.6 for line in lines] == [True] * 5
    model = nn.Sequential(nn.Flatten(), *layers)
    loaded = trainer.load("run/model.dcz", model, coder=packed.Lzma())
    images = torch.rand(2, 1, 28, 28)
    assert torch.equal(loaded(images), result.model(images))
    for name in ("noise", "lowrank", "packed", "notify"):
        del sys.modules[name]


@pytest.mark.usefixtures("elsewhere")
def test_the_example_of_training_settings_learns(monkeypatch):
    few = trainer.data.mnist(train=640, validation=100, test=100)
    monkeypatch.setattr(trainer.data, "mnist", lambda: few)
    names = {"__name__": "__main__"}
    for block in PYTHON.findall((DOCS / "training.md").read_text()):
        exec(compile(block, "training.md", "exec"), names)
    assert names["result"].metrics["accuracy"] > 0.3  # chance is 0.1
