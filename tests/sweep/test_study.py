"""The ledger: what is drawn, told and remembered, without training anything."""

import json

import pytest
from optuna.trial import TrialState

from trainer.config import SweepConfig
from trainer.errors import ConfigError
from trainer.sweep.measures import MEASURES, check_measures, watched
from trainer.sweep.space import parse_space
from trainer.sweep.storage import without_password
from trainer.sweep.study import Ledger

PARAMS = {"a": "range(1,5)", "b": "interval(0,1)"}
EPOCHS = 4


def sweep(**settings):
    return SweepConfig(
        **{"params": PARAMS, "objectives": {"accuracy": "maximize"}, "name": "s"} | settings
    )


def ledger(folder, **settings):
    cfg = sweep(**settings)
    return Ledger(cfg, parse_space(cfg, {}), "test", 3, folder, EPOCHS)


def finish(book, number, value):
    measured = dict.fromkeys(MEASURES, 0.0) | {"accuracy": value, "nonzero": 100 * value}
    book.complete(number, measured, {})


def drive(book, count):
    """Trials one at a time; what was drawn."""
    drawn = []
    for _ in range(count):
        number = book.ask()
        drawn.append(book.take_up(number))
        finish(book, number, drawn[-1]["b"])
    return drawn


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
def test_a_seed_gives_the_same_suggestions_also_after_a_restart(tmp_path, sampler):
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    settings = {"sampler": sampler, "startup_trials": 4}
    whole = drive(ledger(tmp_path / "once", **settings), 9)
    first = drive(ledger(tmp_path / "twice", **settings), 5)
    assert first + drive(ledger(tmp_path / "twice", **settings), 4) == whole
    assert len({json.dumps(drawn) for drawn in whole}) > 5


def test_a_grid_is_gone_through_once(tmp_path):
    params = {"a": "range(1,4)", "b": "choice(0.5,0.7)"}
    book = ledger(tmp_path, sampler="grid", params=params)
    drawn = drive(book, 4)
    book = ledger(tmp_path, sampler="grid", params=params)
    drawn += drive(book, 2)
    assert len({json.dumps(draw) for draw in drawn}) == 6
    assert book.ask() is None


def test_an_unfinished_trial_is_taken_up_with_what_it_had(tmp_path):
    book = ledger(tmp_path)
    drive(book, 1)
    number = book.ask()
    drawn = book.take_up(number)
    book.report(number, 1, 0.5)
    again = ledger(tmp_path)
    assert again.unfinished() == [number]
    assert again.take_up(number) == drawn
    assert again.reported(number) == {1: 0.5}
    finish(again, number, 0.9)
    assert again.unfinished() == []
    assert [trial.number for trial in again.best()][:1] == [1]


def test_the_median_stops_a_trial_and_tells_it_pruned_with_its_values(tmp_path):
    book = ledger(tmp_path, min_trials=3)
    for value in (0.5, 0.6, 0.7):
        number = book.ask()
        book.take_up(number)
        assert not any(book.report(number, epoch, value) for epoch in (1, 2))
        finish(book, number, value)
    number = book.ask()
    book.take_up(number)
    assert book.report(number, 1, 0.4)
    book.prune(number)
    (pruned,) = book.trials(TrialState.PRUNED)
    assert pruned.intermediate_values == {1: 0.4}
    assert book.epochs() == 7


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_several_objectives_are_pruned_by_the_watched_value(tmp_path, pruner):
    objectives = {"accuracy": "maximize", "nonzero": "minimize"}
    book = ledger(tmp_path, objectives=objectives, min_trials=3, pruner=pruner, reduction=2)
    stopped = []
    for value in (0.9, 0.8, 0.85, *[0.1] * 10):
        number = book.ask()
        book.take_up(number)
        if any(book.report(number, epoch, value) for epoch in range(1, EPOCHS)):
            book.prune(number)
            stopped.append(value)
        else:
            finish(book, number, value)
    assert set(stopped) == {0.1}
    assert {trial.values[0] for trial in book.best()} >= {0.9, 0.8, 0.85}


def test_the_best_keeps_the_constraints(tmp_path):
    book = ledger(tmp_path)
    for value, missed in ((0.9, 1.0), (0.8, 0.0)):
        number = book.ask()
        book.take_up(number)
        book.complete(number, dict.fromkeys(MEASURES, value), {"nonzero": missed})
    assert [trial.value for trial in book.best()] == [0.8]


def test_another_sweep_of_the_same_name_is_refused(tmp_path):
    ledger(tmp_path).note({"model": 1, "data": 2}, ["+experiment=x"])
    book = ledger(tmp_path)
    book.note({"model": 1, "data": 2}, ["+experiment=x"])
    with pytest.raises(ConfigError, match=r"sweep\.name=s.*another data;"):
        book.note({"model": 1, "data": 3}, [])


def test_a_storage_that_does_not_open_is_a_wrong_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"sweep\.storage=nonsense://x"):
        ledger(tmp_path, storage="nonsense://x")


def test_the_password_of_a_storage_is_not_shown():
    shown = without_password("postgresql://me:se:cret@host:1/db")
    assert shown == "postgresql://me:***@host:1/db"
    for same in (None, "postgresql://me@host/db", "sqlite:////tmp/a:b/c.db"):
        assert without_password(same) == same


def test_unknown_measures_are_refused():
    for settings in ({"objectives": {"speed": "maximize"}}, {"constraints": {"speed": ">= 1"}}):
        with pytest.raises(ConfigError, match=r"speed: unknown; there are accuracy"):
            check_measures(sweep(**settings))


def test_a_tenth_of_the_weights_is_worth_the_exchange():
    two = sweep(objectives={"accuracy": "maximize", "nonzero": "minimize"}, exchange=0.01)
    assert watched(two, 0.9, 1000) - watched(two, 0.9, 10_000) == pytest.approx(0.01)
    assert watched(sweep(exchange=0.01), 0.9, 1000) == 0.9
