"""The study: drawing, pruning and storing trials, without training."""

import json
import math
import shutil

import pytest
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from trainer.config import SweepConfig
from trainer.errors import ConfigError, RunError
from trainer.sweeps import algorithms
from trainer.sweeps.budget import Budget
from trainer.sweeps.measures import MEASURES, check_measures, not_finite, watched
from trainer.sweeps.space import parse_space
from trainer.sweeps.study import SweepStudy, reported_values, without_password

PARAMS = {"a": "range(1,5)", "b": "interval(0,1)"}
EPOCHS = 4


def sweep(**settings):
    return SweepConfig(
        **{"params": PARAMS, "objectives": {"accuracy": "maximize"}, "name": "s"} | settings
    )


def ledger(folder, own=None, **settings):
    cfg = sweep(**settings)
    book = SweepStudy(cfg, parse_space(cfg, {}), "test", 3, folder, EPOCHS, sampler=own)
    book.record_settings({"objectives": list(cfg.objectives.items())})
    return book


def finish(book, number, value, **more):
    measured = dict.fromkeys(MEASURES, 0.0) | {"accuracy": value, "nonzero": 100 * value}
    book.complete(number, measured | more, {})


def drive(book, count):
    """Trials one at a time; what was drawn."""
    drawn = []
    for _ in range(count):
        number = book.new_trial()
        drawn.append(book.start(number))
        finish(book, number, drawn[-1]["b"])
    return drawn


@pytest.mark.parametrize("sampler", ["tpe", "random", "nsga2"])
@pytest.mark.slow
def test_a_seed_gives_the_same_suggestions_also_after_a_restart(tmp_path, sampler):
    (tmp_path / "once").mkdir()
    (tmp_path / "twice").mkdir()
    settings = {"sampler": sampler, "startup_trials": 4}
    whole = drive(ledger(tmp_path / "once", **settings), 9)
    first = drive(ledger(tmp_path / "twice", **settings), 5)
    assert first + drive(ledger(tmp_path / "twice", **settings), 4) == whole
    assert len({json.dumps(drawn) for drawn in whole}) > 5


def test_a_sampler_of_ones_own_repeats_no_draws_when_the_sweep_continues(tmp_path):
    def session():
        book = ledger(tmp_path, own=RandomSampler(seed=0))
        return drive(book, 3)

    first, second = session(), session()
    assert not any(drawn in first for drawn in second)


def test_a_grid_is_gone_through_once(tmp_path):
    params = {"a": "range(1,4)", "b": "choice(0.5,0.7)"}
    book = ledger(tmp_path, sampler="grid", params=params)
    drawn = drive(book, 4)
    book = ledger(tmp_path, sampler="grid", params=params)
    drawn += drive(book, 2)
    assert len({json.dumps(draw) for draw in drawn}) == 6
    assert book.new_trial() is None


def test_a_driver_that_is_killed_as_it_asks_leaves_the_grid_in_order(tmp_path):
    params = {"a": "range(1,4)", "b": "choice(0.5,0.7)"}
    drive(ledger(tmp_path, sampler="grid", params=params), 2)
    killed = ledger(tmp_path, sampler="grid", params=params)
    assert killed.new_trial() == 2
    book = ledger(tmp_path, sampler="grid", params=params)
    assert book.unfinished() == [2]
    third = book.start(2)
    finish(book, 2, 0.5)
    drive(book, 3)
    assert third == {"a": 2, "b": 0.5}
    assert [trial.params for trial in book.trials()] == [
        {"a": a, "b": b} for a in (1, 2, 3) for b in (0.5, 0.7)
    ]
    assert book.new_trial() is None


@pytest.mark.slow
def test_the_file_of_a_closed_study_is_complete_alone(tmp_path):
    (tmp_path / "copied").mkdir()
    book = ledger(tmp_path)
    drawn = drive(book, 3)
    book.close()
    shutil.copy(tmp_path / "study.db", tmp_path / "copied" / "study.db")
    copied = ledger(tmp_path / "copied")
    assert [trial.params for trial in copied.trials()] == drawn
    copied.close()


def test_a_shared_storage_knows_a_folders_trials_also_after_it_moved(tmp_path):
    storage = f"sqlite:///{tmp_path}/shared.db"
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    ledger(tmp_path / "mine", storage=storage).new_trial()  # and no more: it was killed
    (tmp_path / "mine").rename(tmp_path / "moved")
    assert ledger(tmp_path / "moved", storage=storage).unfinished() == [0]
    assert ledger(tmp_path / "other", storage=storage).unfinished() == []


def test_a_study_in_which_nothing_began_can_be_taken_back(tmp_path):
    storage = f"sqlite:///{tmp_path}/shared.db"
    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
    book = ledger(tmp_path / "mine", storage=storage)
    book.new_trial()
    book.delete()
    book = ledger(tmp_path / "mine", storage=storage)
    assert book.new_trial() == 0
    ledger(tmp_path / "other", storage=storage).new_trial()
    book.delete()  # others are at work in it
    assert len(ledger(tmp_path / "mine", storage=storage).trials()) == 2


def test_the_time_of_a_session_that_was_killed_counts(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    book = ledger(tmp_path)
    budget = Budget(sweep(seconds=10), book)
    now[0] += 7
    budget.keep(now=False)
    now[0] += 2  # and no more: it was killed
    budget.keep(now=False)
    again = Budget(sweep(seconds=10), ledger(tmp_path))
    assert again.seconds() == 7
    assert again.left() == 3
    assert again.used_up() is None
    now[0] += 4
    assert again.used_up() == "sweep.seconds is used up"


def test_an_unfinished_trial_is_taken_up_with_what_it_had(tmp_path):
    book = ledger(tmp_path)
    drive(book, 1)
    number = book.new_trial()
    drawn = book.start(number)
    book.report(number, 1, 0.5)
    again = ledger(tmp_path)
    assert again.unfinished() == [number]
    assert again.start(number) == drawn
    assert again.reported(number) == {1: 0.5}
    finish(again, number, 0.9)
    assert again.unfinished() == []
    assert [trial.number for trial in again.best()][:1] == [1]


def test_the_median_stops_a_trial_and_tells_it_pruned_with_its_values(tmp_path):
    book = ledger(tmp_path, min_trials=3)
    for value in (0.5, 0.6, 0.7):
        number = book.new_trial()
        book.start(number)
        assert not any(book.report(number, epoch, value) for epoch in (1, 2))
        finish(book, number, value)
    number = book.new_trial()
    book.start(number)
    assert book.report(number, 1, 0.4)
    book.prune(number)
    (pruned,) = book.trials(TrialState.PRUNED)
    assert pruned.intermediate_values == {1: 0.4}
    assert book.epochs == 7


def compared_by_pruners(book):
    """The study whose values pruners compare."""
    return book._pruner.study


@pytest.mark.parametrize(
    ("objectives", "metric", "good", "bad"),
    [
        ({"accuracy": "maximize"}, "accuracy", 0.9, 0.1),
        ({"accuracy": "maximize"}, "loss", 0.1, 0.9),
        ({"loss": "minimize"}, "accuracy", 0.9, 0.1),
        ({"loss": "minimize"}, "loss", 0.1, 0.9),
        ({"bytes": "minimize"}, "accuracy", 0.9, 0.1),
    ],
)
@pytest.mark.slow
def test_one_objective_is_pruned_by_the_metric_in_the_metrics_own_direction(
    tmp_path, objectives, metric, good, bad
):
    settings = {"objectives": objectives, "metric": metric, "min_trials": 3}
    book = ledger(tmp_path, **settings)
    (objective,) = objectives
    for value in (0.5, 0.6, 0.7):
        number = book.new_trial()
        book.start(number)
        assert not book.report(number, 1, value)
        finish(book, number, value, **{objective: 0.3})
    book = ledger(tmp_path, **settings)  # what pruners know survives
    best, worst = book.new_trial(), book.new_trial()
    book.start(best)
    book.start(worst)
    assert not book.report(best, 1, good)
    assert book.report(worst, 1, bad)
    book.prune(worst)
    (pruned,) = book.trials(TrialState.PRUNED)
    assert list(reported_values(pruned)) == [1]
    if metric != objective:
        assert pruned.value is None  # the metric is no value of the objective
    assert compared_by_pruners(book).trials[worst].intermediate_values == reported_values(pruned)


def test_sampler_and_pruner_consider_recent_trials_and_the_sampler_the_best(tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms, "TPE_RECENT", 4)
    monkeypatch.setattr(algorithms, "TPE_BEST", 2)
    monkeypatch.setattr(algorithms, "PRUNER_RECENT", 3)
    book = ledger(tmp_path)
    for value in (0.5, 0.9, 0.1, 0.8, *[0.2] * 6):
        number = book.new_trial()
        book.report(number, 1, value)
        finish(book, number, value)
    again = ledger(tmp_path)
    for each in (book, again):
        sampled = each._sampler.study.get_trials()
        assert [trial.value for trial in sampled] == [0.9, 0.8, 0.2, 0.2, 0.2, 0.2]
        assert [trial.number for trial in compared_by_pruners(each).trials] == [7, 8, 9]
    assert book.leader.number == again.leader.number == 1


def test_the_sampler_considers_the_pareto_front(tmp_path, monkeypatch):
    monkeypatch.setattr(algorithms, "TPE_RECENT", 2)
    objectives = {"accuracy": "maximize", "bytes": "minimize"}
    book = ledger(tmp_path, objectives=objectives, sampler="tpe")
    results = [(0.9, 9.0), (0.5, 5.0), (0.4, 6.0), (0.9, 8.0), (0.6, 4.0), (0.1, 9.0), (0.2, 9.0)]
    for accuracy, size in results:
        finish(book, book.new_trial(), accuracy, bytes=size)
    sampled = book._sampler.study.get_trials()
    assert [tuple(trial.values) for trial in sampled] == [*results[3:5], *results[5:]]
    assert [tuple(trial.values) for trial in book.best()] == results[3:5]
    assert book.leader.number == 3


def test_nothing_is_read_from_the_storage_during_a_sweep(tmp_path, monkeypatch):
    book = ledger(tmp_path, min_trials=1)
    read = "optuna.storages._rdb.storage.RDBStorage._get_trials"
    monkeypatch.setattr(read, lambda *_, **__: pytest.fail("the storage was read"))
    for _ in range(12):
        number = book.new_trial()
        value = book.start(number)["b"]
        if book.report(number, 1, value):
            book.prune(number)
        else:
            finish(book, number, value)
    assert book.leader is not None
    assert sum(book.counts.values()) == 12


def test_a_trial_whose_last_watched_value_is_nan_is_not_shown_to_the_pruner(tmp_path):
    book = ledger(tmp_path, metric="loss")
    number = book.new_trial()
    book.start(number)
    book.report(number, 1, math.nan)
    finish(book, number, 0.5)
    assert compared_by_pruners(book).trials[0].state == TrialState.FAIL
    again = ledger(tmp_path, metric="loss")
    assert compared_by_pruners(again).trials[0].state == TrialState.FAIL


def test_what_is_not_finite_is_named():
    measured = dict.fromkeys(MEASURES, 0.5)
    assert not_finite(sweep(), measured) is None
    for name in ("accuracy", "loss"):
        said = not_finite(sweep(), measured | {name: math.nan})
        assert said == f"the {name} after the last phase is nan"
    assert not_finite(sweep(), measured | {"bytes": math.inf}) is None
    judged = sweep(constraints={"bytes": "<= 1"})
    assert not_finite(judged, measured | {"bytes": math.inf})


def test_an_objective_can_be_taken_away():
    assert sweep(objectives={"accuracy": None, "loss": "minimize"}).objectives == {
        "loss": "minimize"
    }
    with pytest.raises(ConfigError, match=r"sweep\.objectives: there are none"):
        sweep(objectives={"accuracy": None})


@pytest.mark.parametrize(
    "objectives", [{"accuracy": "maximize"}, {"accuracy": "maximize", "nonzero": "minimize"}]
)
@pytest.mark.slow
def test_asha_stops_from_the_second_trial_on(tmp_path, objectives):
    """At epoch 1 one in two goes on; what it knows survives a restart."""
    settings = {"pruner": "asha", "reduction": 2, "objectives": objectives}
    stopped = []
    for value in (0.5, 0.4, 0.6, 0.3, 0.7):
        book = ledger(tmp_path, **settings)
        number = book.new_trial()
        book.start(number)
        if book.report(number, 1, value):
            book.prune(number)
            stopped.append(value)
        else:
            finish(book, number, value)
    assert stopped == [0.4, 0.3]


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
@pytest.mark.slow
def test_several_objectives_are_pruned_by_the_watched_value(tmp_path, pruner):
    objectives = {"accuracy": "maximize", "nonzero": "minimize"}
    book = ledger(tmp_path, objectives=objectives, min_trials=3, pruner=pruner, reduction=2)
    stopped = []
    for value in (0.9, 0.8, 0.85, *[0.1] * 10):
        number = book.new_trial()
        book.start(number)
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
        number = book.new_trial()
        book.start(number)
        book.complete(number, dict.fromkeys(MEASURES, value), {"nonzero": missed})
    assert [trial.value for trial in book.best()] == [0.8]


def test_another_sweep_of_the_same_name_is_refused(tmp_path):
    cfg = sweep()
    book = SweepStudy(cfg, parse_space(cfg, {}), "test", 3, tmp_path, EPOCHS)
    for _ in range(2):
        book.record_settings({"model": 1, "data": 2})
    with pytest.raises(ConfigError, match=r"sweep\.name=s.*another data;"):
        book.record_settings({"model": 1, "data": 3})


@pytest.mark.parametrize(
    "objectives", [{"loss": "minimize"}, {"accuracy": "maximize", "bytes": "minimize"}]
)
def test_other_objectives_are_another_sweep_and_leave_the_first_as_it_was(tmp_path, objectives):
    ledger(tmp_path)
    with pytest.raises(ConfigError, match="another objectives;"):
        ledger(tmp_path, objectives=objectives)
    assert ledger(tmp_path).study.metric_names == ["accuracy"]


def test_a_storage_that_does_not_open_is_a_wrong_configuration(tmp_path):
    with pytest.raises(ConfigError, match=r"sweep\.storage=nonsense://x"):
        ledger(tmp_path, storage="nonsense://x")


@pytest.mark.parametrize("name", ["a?b", "50%20x", "{a}", "with space", "ä#"])
@pytest.mark.slow
def test_a_folder_of_any_name_holds_its_study(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    drive(ledger(folder), 1)
    assert (folder / "study.db").stat().st_size
    assert len(ledger(folder).trials()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_study_of_the_sweeps_own_that_does_not_open_is_a_failure(tmp_path):
    (tmp_path / "study.db").write_text("no data base")
    with pytest.raises(RunError, match=r"study\.db: .*not a database"):
        ledger(tmp_path)


def test_a_study_whose_begin_was_cut_short_is_begun_again(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("optuna.Study.set_metric_names", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger(tmp_path)
    book = ledger(tmp_path)
    assert book.new
    assert book.study.metric_names == ["accuracy"]


def killed(*_):
    raise KeyboardInterrupt


def test_the_password_of_a_storage_is_not_shown():
    shown = without_password("postgresql://me:se:cret@host:1/db")
    assert shown == "postgresql://me:***@host:1/db"
    for same in (None, "postgresql://me@host/db", "sqlite:////tmp/a:b/c.db"):
        assert without_password(same) == same


def test_unknown_measures_are_refused():
    for settings in ({"objectives": {"speed": "maximize"}}, {"constraints": {"speed": ">= 1"}}):
        with pytest.raises(ConfigError, match=r"speed: unknown; there are accuracy"):
            check_measures(sweep(**settings), {"accuracy": "maximize"})


def test_a_tenth_of_the_weights_is_worth_the_size_weight():
    two = sweep(objectives={"accuracy": "maximize", "nonzero": "minimize"}, size_weight=0.01)
    assert watched(two, 0.9, 1000) - watched(two, 0.9, 10_000) == pytest.approx(0.01)
    assert watched(sweep(size_weight=0.01), 0.9, 1000) == 0.9
