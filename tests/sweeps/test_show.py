"""The live table: what it says, and when."""

import io
from types import SimpleNamespace

import pytest
from optuna.trial import TrialState, create_trial
from rich.console import Console

from trainer.config import SweepConfig
from trainer.store.directory import RunDirectory
from trainer.sweeps import search as searches
from trainer.sweeps import show
from trainer.sweeps.budget import Budget
from trainer.sweeps.search import Search

CFG = SweepConfig(params={"a": "range(3)"}, objectives={"accuracy": "maximize"})


class Book:
    """In the place of a ledger: two trials that ended, one that runs."""

    seconds = 0.0

    def __init__(self):
        done = create_trial(value=0.98765, state=TrialState.COMPLETE)
        done.number = 7
        self.ended = [done, create_trial(state=TrialState.PRUNED)]
        self.asked = 0

    def unfinished(self):
        return []

    def trials(self, *states):
        return [*self.ended, create_trial(state=TrialState.RUNNING)]

    def epochs(self):
        return 0

    def best(self):
        self.asked += 1
        return self.ended[:1]

    def note_seconds(self, seconds): ...


def test_it_shows_the_best_trial_the_counts_the_time_left_and_what_runs(tmp_path, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    monkeypatch.setattr(show, "Terminal", lambda: console)
    board, book = show.LiveTable(CFG, RunDirectory(tmp_path)), Book()
    trial = SimpleNamespace(value=0.5, drawn={"a": 2}, epoch=1, epochs=4)
    with board:
        for left in (31, 30):
            board.show({9: trial}, book, left)
    said = out.getvalue()
    assert "1 complete, 1 pruned, 0 failed, 1 running, 30 s left" in said
    assert "best: trial 7, accuracy 0.98765" in said
    assert "settings" in said
    assert "a=2" in said
    assert "1/4" in said
    assert book.asked == 1  # nothing has ended meanwhile


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

    board = SimpleNamespace(show=lambda *_: shown.append(now[0]))
    plan = SimpleNamespace(cfg=SimpleNamespace(sweep=SweepConfig(**{**vars(CFG), "trials": 3})))
    book, pool = Book(), Talking()
    search = Search(plan, book, pool, board, Budget(CFG, book), RunDirectory(tmp_path))
    monkeypatch.setattr(search, "_on", lambda event: None)
    monkeypatch.setattr(search, "_may_begin", lambda: False)
    search.run(lambda: False)
    assert len(shown) == pytest.approx(4.1 / searches.LOOK_EVERY_S, abs=4)
