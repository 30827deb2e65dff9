"""The picture in the README: complete in itself, and wide enough for no more than a phone."""

import importlib.util
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.report.test_page import ARTIFACT, SUMMARY
from tests.report.test_terminal import MESSAGES
from trainer.messages import Notice
from trainer.report.plots import compression
from trainer.report.tables import tables

SCRIPT = Path(__file__).parents[2] / "docs" / "picture.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("picture", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_complete_in_itself(script):
    recorder = script.Recorder()
    with recorder:
        for message in [*MESSAGES, Notice("run directory: /somewhere")]:
            recorder.on(message)
        for table in tables({**SUMMARY, "artifact": ARTIFACT}):
            recorder.show(table)
        recorder.say("results in /somewhere")
    text = script.picture(recorder.svg(), compression(ARTIFACT["stages"]))
    root = ElementTree.fromstring(text)
    assert "@font-face" not in text
    assert "url(http" not in text
    assert "var(" not in text  # a README has no theme
    letters = "".join(root.itertext()).replace("\xa0", " ")
    for part in (script.COMMAND, "prune done in", "model.dcz", "38.9x", "times smaller"):
        assert part in letters
    for part in ("epoch 1:", "fc.weight", "/somewhere", "starting Ray"):
        assert part not in letters


def test_the_picture_in_the_readme_is_one_that_the_script_draws(script):
    text = script.PICTURE.read_text()
    ElementTree.fromstring(text)
    assert script.GROUND in text
    assert text.count("<svg") == 3  # the picture, the terminal, the chart
