"""Notebooks: live progress in the output of a cell, and results as HTML."""

import sys
from types import SimpleNamespace

import pytest

from tests.report.test_page import ARTIFACT, METRICS, SUMMARY, Page
from tests.report.test_terminal import MESSAGES, PHASE, STARTED, progress
from trainer.messages import Status
from trainer.report.notebook import NotebookLive, as_html, in_notebook, run_html
from trainer.report.terminal import Console


class Cell:
    """In the place of IPython's display of a cell's output."""

    def __init__(self):
        self.outputs = []

    def display(self, html, display_id):
        assert display_id
        self.outputs.append(html)
        return SimpleNamespace(update=self.outputs.append)


@pytest.fixture
def cell(monkeypatch):
    found = Cell()
    display = SimpleNamespace(HTML=str, display=found.display)
    shell = SimpleNamespace(kernel=object())
    module = SimpleNamespace(get_ipython=lambda: shell, display=display)
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return found


def test_a_terminal_with_ipython_is_not_a_notebook(monkeypatch):
    assert not in_notebook()
    for shell in (None, SimpleNamespace()):
        module = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", module)
        assert not in_notebook()


def test_progress_is_shown_in_one_output_which_disappears(cell, capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Console() as console:
        console.on(Status("starting 2 workers"))
        assert "starting 2 workers" in cell.outputs[-1]
        for message in (STARTED, PHASE, progress(5)):
            console.on(message)
        now[0] += 10.0
        console.on(progress(10))
        assert "phase 2 of 3: prune" in cell.outputs[-1]
        assert "10/20 steps" in cell.outputs[-1]
        shown = len(cell.outputs)
        for _ in range(100):  # within a moment
            console.on(progress(11))
        assert len(cell.outputs) == shown
        console.on(MESSAGES[-1])
    assert cell.outputs[-1] == ""
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 workers on cpu")
    assert "starting 2 workers" not in lines  # only in the live display


def test_a_quiet_console_shows_nothing(cell, capsys):
    with Console.quiet() as console:
        for message in MESSAGES:
            console.on(message)
    assert cell.outputs == []
    assert capsys.readouterr().out == ""


def test_a_live_display_can_be_updated_by_hand(cell):
    live = NotebookLive()
    live.update("not yet", refresh=True)
    assert cell.outputs == []
    live.start()
    live.update("<b> & co", refresh=True)
    assert "&lt;b&gt; &amp; co" in cell.outputs[-1]
    live.stop()
    live.stop()
    assert cell.outputs[-1] == ""
    assert not live.is_started


def test_markup_is_text():
    assert as_html("plain").count("<pre") == 1


def test_a_run_as_html_has_its_charts_and_tables():
    text = run_html({**SUMMARY, "artifact": ARTIFACT}, METRICS)
    parsed = Page(text)
    assert parsed.tags.count("svg") == 3
    assert all(part in parsed.text for part in ("93.22%", "38.9x", "fc.weight"))
    assert parsed.tags.count("table") == 3
    assert "html" not in parsed.tags  # a part of a page
    assert not {"script", "link", "img"} & set(parsed.tags)


def test_a_run_that_only_trained_has_no_compression():
    parsed = Page(run_html({**SUMMARY, "baseline_accuracy": None}, METRICS))
    assert parsed.tags.count("svg") == 2
    assert parsed.tags.count("table") == 1
