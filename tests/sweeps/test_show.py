"""The live table of a sweep, and progress lines."""

import io
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from trainer.config import SweepConfig
from trainer.store.directory import RunDirectory
from trainer.sweeps import search as searches
from trainer.sweeps import show
from trainer.sweeps.budget import Budget
from trainer.sweeps.labels import short_names
from trainer.sweeps.search import Search
from trainer.sweeps.space import parse_space

CFG = SweepConfig(params={"a": "range(3)"}, objectives={"accuracy": "maximize"})


class Book:
    """In the place of a study: two trials that ended, one that runs."""

    seconds = 0.0
    epochs = 0

    def __init__(self):
        self.leader = create_trial(value=0.98765, state=TrialState.COMPLETE)
        self.leader.number = 7
        self.ended = [self.leader, create_trial(state=TrialState.PRUNED)]

    @property
    def counts(self):
        states = [trial.state for trial in self.ended]
        return Counter([*states, TrialState.RUNNING])

    def unfinished(self):
        return []

    def trials(self):
        return self.ended

    def record_seconds(self, seconds): ...


def test_it_shows_the_best_trial_the_counts_the_time_left_and_what_runs(tmp_path, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(show, "Terminal", lambda: console)
    board, book = show.LiveTable(CFG, RunDirectory(tmp_path), total=40), Book()
    settings = {"optimizer.lr": 0.012345678901234567, "phases.prune.overrides.fc1": 0.9}
    settings |= {f"model.width.{n}": 2**n for n in range(8)}
    trial = SimpleNamespace(value=0.5, drawn=settings, epoch=1, epochs=4)
    with board:
        for left in (31, 30):
            board.show({9: trial}, book, left)
    said = out.getvalue()
    assert "2 of 40 trials ended: 1 complete, 1 pruned, 1 running; 30 s left" in said
    assert "best: trial 7, accuracy 98.77%" in said
    assert "settings" in said
    assert "optimizer.lr=0.0123, prune.fc1=0.9" in said
    (row,) = {line for line in said.splitlines() if "0.0123" in line}
    assert re.match(r" *9 +1/4 +50.00% +optimizer.lr=0.0123, .*…$", row)  # settings are cut
    assert len(row) <= 80


def test_the_time_left_is_that_of_the_trials_to_come_or_of_the_budget(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    board, book = show.LiveTable(CFG, RunDirectory(tmp_path), total=12), Book()
    assert board._progress(book, None) == "2 of 12 trials ended: 1 complete, 1 pruned, 1 running"
    now[0] += 120
    book.ended *= 3  # 4 trials in two minutes, 6 to come
    assert board._progress(book, None).endswith("; about 3 min 00 s left")
    assert board._progress(book, 200.0).endswith("; about 3 min 00 s left")
    assert board._progress(book, 60.0).endswith("; 1 min 00 s left")


def test_without_a_terminal_progress_is_a_line_a_minute(tmp_path, monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    board, book = show.LiveTable(CFG, RunDirectory(tmp_path), total=12), Book()
    with board:
        for _ in range(1000):
            now[0] += 0.13
            board.show({}, book, None)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["2 of 12 trials ended: 1 complete, 1 pruned, 1 running"] * 2
    assert (tmp_path / "log.txt").read_text().count("2 of 12") == 2


@pytest.mark.parametrize(
    ("settings", "total"),
    [
        ({"trials": 40}, 40),
        ({"trials": None}, None),
        ({"trials": None, "sampler": "grid"}, 3),
        ({"trials": 2, "sampler": "grid"}, 2),
    ],
)
def test_how_many_trials_there_will_be(settings, total):
    cfg = SweepConfig(**{**vars(CFG), **settings})
    assert show.total_trials(cfg, parse_space(cfg, {})) == total


def test_names_are_shortened_as_long_as_they_differ():
    keys = ["phases.prune.overrides.fc1", "phases.prune.fit.fc1", "optimizer.lr", "phases.fit"]
    assert list(short_names(keys).values()) == [*keys[:2], "optimizer.lr", "phases.fit"]
    assert short_names(["phases.train.fit.lr"]) == {"phases.train.fit.lr": "train.lr"}


def test_it_is_renewed_by_the_clock_however_much_the_trials_say(tmp_path, monkeypatch):
    now, shown = [100.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    class Talking:
        busy, free, left = True, False, 41

        def follow_cluster(self): ...

        def event(self, timeout_s):
            now[0] += 0.1
            self.left -= 1
            self.busy = self.left > 0
            return "said"

    board = SimpleNamespace(show=lambda *_: shown.append(now[0]), say=None)
    cfg = SweepConfig(**{**vars(CFG), "trials": 3})
    plan = SimpleNamespace(cfg=SimpleNamespace(name="n", sweep=cfg))
    book, pool = Book(), Talking()
    search = Search(plan, book, pool, board, Budget(CFG, book), RunDirectory(tmp_path))
    monkeypatch.setattr(search, "_on", lambda event: None)
    monkeypatch.setattr(search, "_may_begin", lambda: False)
    search.run(lambda: False)
    assert len(shown) == pytest.approx(4.1 / searches.LOOK_EVERY_S, abs=4)
