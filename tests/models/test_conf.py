"""Model files of conf/ build their models, and list every setting."""

import inspect
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import get_object, instantiate

FILES = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_lists_all_settings_with_their_defaults_and_builds(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    target = settings.pop("_target_")
    parameters = inspect.signature(get_object(target)).parameters
    assert settings == {name: p.default for name, p in parameters.items()}
    with torch.device("meta"):
        model = instantiate({"_target_": target, **settings})
    assert isinstance(model, torch.nn.Module)


def test_there_are_files() -> None:
    assert len(FILES) == 10
