"""report.html of a sweep: charts that show what their captions say, in a small file."""

import json
import math
import random
import re
from types import SimpleNamespace

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from trainer.report.table import Table
from trainer.store.directory import RunDirectory
from trainer.sweeps import plots
from trainer.sweeps.analysis import Answer
from trainer.sweeps.notebook import sweep_html
from trainer.sweeps.page import best_table, charts, page
from trainer.sweeps.parameter_plots import Scale
from trainer.sweeps.plots import Objective
from trainer.sweeps.study import open_storage

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

SPACE = {
    "optimizer.lr": FloatDistribution(1e-4, 1e-1, log=True),
    "model.depth": IntDistribution(1, 4),
    "phases.prune.overrides.fc1": FloatDistribution(0.5, 0.99),
    "phases.prune.enabled": CategoricalDistribution([True, False, 1, "[fc1, fc2]"]),
}


def make_study(directions, trials, seed=0):
    study = optuna.create_study(directions=directions)
    study.set_metric_names(["accuracy", "bytes"][: len(directions)])
    chance = random.Random(seed)
    for number in range(trials):
        params = {
            "optimizer.lr": 10 ** chance.uniform(-4, -1),
            "model.depth": chance.randint(1, 4),
            "phases.prune.overrides.fc1": chance.uniform(0.5, 0.99),
            "phases.prune.enabled": chance.choice([True, False, 1, "[fc1, fc2]"]),
        }
        state = TrialState.PRUNED if number % 3 == 2 else TrialState.COMPLETE
        values = [chance.uniform(0.9, 1), chance.uniform(1e3, 1e5)][: len(directions)]
        study.add_trial(
            create_trial(
                state=state,
                params=params,
                distributions=SPACE,
                values=values if state == TrialState.COMPLETE else None,
                intermediate_values={n: chance.random() for n in range(1, 1 + number % 20)}
                if len(directions) == 1
                else {},
            )
        )
    return study


def summary(**changes):
    return {
        "name": "mine",
        "sweep": "first",
        "status": "done",
        "error": None,
        "date": "2026-11-29 03:00:00",
        "command": "python -m trainer +experiment=mine",
        "seconds": 100.0,
        "epochs": 30,
        "objectives": {"accuracy": "maximize"},
        "trials": {"complete": 20, "pruned": 10, "failed": 0, "unfinished": 0},
        "best": [
            {
                "number": 7,
                "values": {"accuracy": 0.98765},
                "params": {"optimizer.lr": 0.0123456789, "phases.prune.overrides.fc1": 0.5},
                "command": "python -m trainer +experiment=mine optimizer.lr=0.0123456789",
            }
        ],
        **changes,
    }


@pytest.mark.parametrize("directions", [["maximize", "minimize"], ["maximize"]])
def test_importances_are_of_what_makes_trials_good(directions):
    """Beyond 0.8, `a` alone decides the accuracy, below it `b` alone."""
    study = optuna.create_study(directions=directions)
    study.set_metric_names(["accuracy", "bytes"][: len(directions)])
    chance = random.Random(0)
    for _ in range(80):
        a, b = chance.random(), chance.random()
        accuracy = a if a > 0.8 else 0.5 * b
        study.add_trial(
            create_trial(
                params={"a": a, "b": b},
                distributions=dict.fromkeys("ab", FloatDistribution(0, 1)),
                values=[accuracy, chance.random()][: len(directions)],
            )
        )
    found = plots.parameter_importances(study, [Objective(0, "accuracy", True)])
    assert found["accuracy"]["a"] > 2 * found["accuracy"]["b"]
    assert plots.by_importance(found) == ["a", "b"]


@pytest.mark.parametrize(
    ("directions", "sections"),
    [
        (["maximize"], {"Early stopping"}),
        (["maximize", "minimize"], {"Trade-off between objectives"}),
    ],
)
@pytest.mark.slow
def test_the_sections_follow_from_the_objectives(directions, sections):
    study = make_study(directions, 24)
    found = charts(study)
    common = {"History", "Importance of parameters", "Parallel coordinates"}
    titles = {title for title in found if not title.startswith("Objectives against")}
    assert titles == common | sections
    slices = next(svgs for title, svgs in found.items() if title.startswith("Objectives against"))
    assert len(slices) == len(SPACE) * len(directions)


@pytest.mark.slow
def test_a_sweep_of_three_thousand_trials_makes_a_small_page():
    study = make_study(["maximize"], 3000)
    text = page(study, summary(), Answer())
    assert len(text) < 400_000
    assert re.search(r"4\d\d of 2000 trials", text)
    assert "500 of 2850 trials" in text  # of those that reported a value


def test_thinning_out_keeps_the_best_trials():
    trials = [SimpleNamespace(number=number) for number in range(4000)]
    best = trials[3001:3004]
    kept = plots.thin_out(trials, best)
    assert len(kept) <= plots.MAX_TRIALS
    assert {3001, 3002, 3003} <= {trial.number for trial in kept}
    assert [trial.number for trial in kept] == sorted(trial.number for trial in kept)
    assert kept[0].number == 0
    assert kept[-1].number > 3900
    assert plots.thin_out(trials[:9], []) == trials[:9]


def test_too_few_trials_make_no_charts():
    study = make_study(["maximize"], 1)
    assert charts(study) == {}
    assert "History" not in page(study, summary(best=[]), Answer())


def test_choices_are_distinguished_by_their_type():
    """Optuna's choices True and 1 are equal in Python."""
    scale = Scale(SPACE["phases.prune.enabled"])
    assert [scale.number(value) for value in (True, False, 1, "[fc1, fc2]")] == [0, 1, 2, 3]
    assert (scale.fraction(True), scale.fraction("[fc1, fc2]")) == (0, 1)
    assert (scale.label(0), scale.label(1)) == ("True", "[fc1, fc2]")


def test_a_logarithmic_parameter_is_spread_over_its_axis():
    scale = Scale(SPACE["optimizer.lr"])
    assert scale.fraction(1e-4) == pytest.approx(0)
    assert scale.fraction(10**-2.5) == pytest.approx(0.5)
    assert (scale.label(0), scale.label(1)) == ("0.0001", "0.1")


@pytest.mark.usefixtures("charts_not_drawn")
def test_the_page_shows_the_command_and_a_few_digits_of_each_setting():
    study = make_study(["maximize"], 12)
    text = page(study, summary(), Answer())
    assert "2026-11-29 03:00:00" in text
    assert "<code>python -m trainer +experiment=mine</code>" in text
    table = best_table(summary())
    assert table.columns == ("trial", "accuracy", "optimizer.lr", "prune.fc1")
    assert table.rows == [("7", "98.77%", "0.0123", "0.5")]
    assert "optimizer.lr=0.0123456789" in text  # in full in the command


@pytest.mark.usefixtures("charts_not_drawn")
def test_the_table_of_an_analysis_comes_before_its_sentences():
    study = make_study(["maximize"], 12)
    drawn = Answer(
        [Table("Every combination", ("a", "b"), [("x", "1")])],
        {"the chart": lambda: "<svg/>"},
        ["A conclusion."],
    )
    text = page(study, summary(), drawn)
    places = [text.index(part) for part in ("Every combination", "A conclusion.", "the chart")]
    assert places == sorted(places)


def test_names_of_parameters_are_text():
    study = optuna.create_study(directions=["maximize"])
    study.set_metric_names(["accuracy"])
    name = '<script>"</script>&$\\frac{'
    for value in (0.1, 0.2, 0.3):
        study.add_trial(
            create_trial(
                params={name: value, "b": value},
                distributions={key: FloatDistribution(0, 1) for key in (name, "b")},
                values=[value],
            )
        )
    text = page(study, summary(name=name), Answer())
    assert "<script" not in text
    assert not re.search(r"https?://(?!www\.w3\.org)", text)  # nothing is fetched


@pytest.mark.slow
def test_a_sweep_in_a_notebook_shows_its_best_trials_analysis_and_charts(tmp_path, request):
    storage = open_storage(None, tmp_path)
    study = optuna.create_study(directions=["maximize"], storage=storage, study_name="mine/first")
    study.set_metric_names(["accuracy"])
    study.add_trials(make_study(["maximize"], 12).trials)
    storage.remove_session()
    table = {"title": "Every combination", "columns": ["a"], "rows": [["x1"]], "caption": "so"}
    found = summary(analysis={"tables": [table], "sentences": ["A conclusion."]})
    (tmp_path / "summary.json").write_text(json.dumps(found))
    RunDirectory(tmp_path).write_config({"sweep": {"storage": None}})
    text = sweep_html(tmp_path)
    for part in ("Every combination", "x1", "A conclusion.", "98.77%", "prune.fc1", "best so far"):
        assert part in text
    assert "<html" not in text
    request.getfixturevalue("charts_not_drawn")  # only counted from here on
    assert text.count("<svg") == len([svg for svgs in charts(study).values() for svg in svgs])


def test_a_trial_pruned_after_its_first_epoch_is_a_dot():
    trials = [
        create_trial(state=TrialState.PRUNED, intermediate_values={1: 0.5}),
        create_trial(value=0.9, intermediate_values={1: 0.6, 2: 0.9}),
    ]
    both = plots.intermediate(trials, "accuracy")
    without = plots.intermediate(trials[1:], "accuracy")
    assert both.count("stroke-linecap: round") > without.count("stroke-linecap: round")
    assert "pruned" in both
    assert "pruned" not in without
    assert "90.0%" in both
    plots.intermediate([create_trial(value=1, intermediate_values={1: math.inf})], "loss")


def test_columns_of_the_best_trials_are_sorted_although_each_has_parameters_of_its_own():
    best = [
        {"number": n, "values": {"accuracy": 0.9}, "params": dict.fromkeys(names, 1)}
        for n, names in enumerate(["adf", "abf"])
    ]
    table = best_table(summary(best=best))
    assert table.columns == ("trial", "accuracy", "a", "b", "d", "f")
    assert table.rows == [("0", "90.00%", "1", "", "1", "1"), ("1", "90.00%", "1", "1", "", "1")]
