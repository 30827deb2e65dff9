"""The plots of report.html: that they say what their titles say."""

import random

import optuna
import pytest

from trainer.sweeps.report import _plots


@pytest.mark.filterwarnings("ignore")  # as write_report does
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
            optuna.trial.create_trial(
                params={"a": a, "b": b},
                distributions=dict.fromkeys("ab", optuna.distributions.FloatDistribution(0, 1)),
                values=[accuracy, chance.random()][: len(directions)],
            )
        )
    (bars,) = _plots(study, study)["accuracy: importances"].data
    importances = dict(zip(bars.y, bars.x, strict=True))
    assert importances["a"] > 2 * importances["b"]
