"""Data files of conf/ list every setting of their functions, with its default."""

import inspect
from pathlib import Path

import pytest
import yaml
from hydra.utils import get_object

FILES = sorted((Path(__file__).parents[2] / "conf" / "data").glob("*.yaml"))
MISSING = "???"  # OmegaConf's mark for a value that must be given


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file_lists_all_settings_with_their_defaults(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    parameters = dict(inspect.signature(get_object(settings.pop("_target_"))).parameters)
    assert settings.pop("batch_size") >= 1
    parameters.pop("seed", None)
    assert list(settings) == list(parameters)
    for name, parameter in parameters.items():
        default = list(parameter.default) if parameter.default == () else parameter.default
        expected = MISSING if parameter.default is parameter.empty else default
        assert settings[name] == expected, name


def test_there_are_files() -> None:
    assert [file.stem for file in FILES] == [
        "dataset",
        "huggingface",
        "images",
        "mnist",
        "stream",
        "table",
        "text",
    ]
