"""The example of docs/own-phase.md works as printed."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from tests.experiments import experiment
from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.phases import Prune

PAGE = (Path(__file__).parents[2] / "docs" / "own-phase.md").read_text()


def test_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)
    blocks, check = dict(found[:2]), found[-1][1]
    (tmp_path / "noise.py").write_text(blocks["python"])
    monkeypatch.syspath_prepend(tmp_path)
    world = World.single(torch.device("cpu"))
    model = nn.Linear(8, 8)
    Prune(0.5, fit=FitConfig()).enter(model, world)
    before = model.weight.detach().clone()

    phase = experiment(phases=yaml.safe_load(blocks["yaml"])["phases"]).phases["shake"]
    exec(check, {})
    sys.modules.pop("noise")
    phase.check_model(model)
    phase.enter(model, world)
    phase.after_step(model, world, 1, 10)
    phase.leave(model)
    assert phase.kind == "shake"
    assert torch.equal(model.weight == 0, before == 0)
    assert not torch.equal(model.weight, before)
    torch.testing.assert_close(model.weight, before, rtol=0.2, atol=0)
