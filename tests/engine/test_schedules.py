"""Learning-rate schedules as functions of the step."""

import math
from itertools import pairwise

import pytest

from trainer.config import FitConfig
from trainer.engine.schedules import lr_factor


def test_warm_up_reaches_the_peak_at_its_last_step():
    fit = FitConfig(epochs=4, warmup_epochs=1)
    factors = [lr_factor(step, 40, 10, fit) for step in range(40)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10] == 1
    assert all(a > b for a, b in pairwise(factors[10:]))


def test_cosine_is_the_published_formula():
    fit = FitConfig(epochs=1)
    for step in (0, 25, 50, 99):
        assert lr_factor(step, 100, 100, fit) == pytest.approx(
            (1 + math.cos(math.pi * step / 100)) / 2
        )


def test_step_drops_at_the_epoch():
    fit = FitConfig(epochs=6, schedule="step", step_epochs=2, step_gamma=0.1)
    factors = [lr_factor(step, 60, 10, fit) for step in range(60)]
    assert factors[19] == 1
    assert factors[20] == pytest.approx(0.1)
    assert factors[59] == pytest.approx(0.01)


def test_constant_stays():
    assert {lr_factor(step, 9, 3, FitConfig(schedule="constant")) for step in range(9)} == {1.0}
