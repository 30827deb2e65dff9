"""Learning-rate schedules as functions of the step."""

import math
from itertools import pairwise

import pytest

from trainer.config import FitConfig
from trainer.engine.schedules import build_schedule, check_schedule, lr_factor
from trainer.errors import ConfigError

ONE_CYCLE = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "cycle_momentum": False}


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


def test_polynomial_falls_to_zero_after_the_warm_up():
    fit = FitConfig(epochs=10, schedule="polynomial", power=2, warmup_epochs=1)
    factors = [lr_factor(step, 100, 10, fit) for step in range(100)]
    assert factors[9] == factors[10] == 1
    assert factors[55] == pytest.approx(0.25)
    assert factors[99] == pytest.approx((1 / 90) ** 2)


def test_one_cycle_is_that_of_torch():
    ours = FitConfig(epochs=1, schedule="one_cycle")
    theirs = FitConfig(epochs=1, schedule={**ONE_CYCLE, "max_lr": 0.4})
    expected = build_schedule(theirs, 0.4, 100, 100)
    for step in range(100):
        assert 0.4 * lr_factor(step, 100, 100, ours) == pytest.approx(expected(step), abs=1e-12)
    for total in range(1, 8):
        assert all(0 < lr_factor(step, total, total, ours) <= 1 for step in range(total))


def test_a_scheduler_of_torch_is_followed_from_any_step_on():
    settings = {"_target_": "torch.optim.lr_scheduler.MultiStepLR", "milestones": [3, 5]}
    fit = FitConfig(epochs=1, schedule=settings, warmup_epochs=0.5)
    rates = list(map(build_schedule(fit, 0.2, 8, 4), range(8)))
    assert rates == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.2, 0.02, 0.02, 0.002])
    for step in range(8):
        resumed = build_schedule(fit, 0.2, 8, 4)
        assert list(map(resumed, range(step, 8))) == rates[step:]


def halving(step, total_steps, floor=0.0):
    return max(floor, 0.5 ** (step / total_steps))


def test_a_function_is_called_with_what_it_takes():
    settings = {"_target_": f"{__name__}.halving", "floor": 0.6}
    schedule = build_schedule(FitConfig(epochs=1, schedule=settings), 0.2, 10, 5)
    assert [schedule(step) for step in (0, 5, 9)] == pytest.approx([0.2, 0.2 * 0.5**0.5, 0.12])
    assert build_schedule(FitConfig(epochs=1, schedule=lambda step: step), 0.5, 9, 9)(4) == 2


@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({}, r"fit\.schedule\._target_ is missing"),
        ({"_target_": "torch.optim.lr_scheduler.Multi"}, r"fit\.schedule\._target_=.*imported"),
        ({"_target_": "torch.nn.Linear"}, r"must be a function .* or the _target_ of a class"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR", "gama": 1}, r"fit\.schedule\.gama: unk"),
        ({"_target_": "torch.optim.lr_scheduler.StepLR"}, r"fit\.schedule \(StepLR\): .*step_size"),
        ({**ONE_CYCLE, "max_lr": 0.4, "cycle_momentum": True}, "set cycle_momentum=false"),
        ({"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}, "metrics"),
        ({"_target_": f"{__name__}.halving", "half": 2}, r"fit\.schedule\.half: unknown"),
        ({"_target_": "math.log"}, r"fit\.schedule: .*no keyword arguments"),
        (lambda step: -1.0, r"learning rate after 0 steps is -0\.1"),
        (lambda step: "fast", r"fit\.schedule: TypeError"),
    ],
)
def test_wrong_schedules_are_refused(schedule, said):
    with pytest.raises(ConfigError, match=said):
        check_schedule(FitConfig(epochs=1, schedule=schedule), 0.1)


def test_a_scheduler_that_ends_before_the_training_is_refused():
    fit = FitConfig(epochs=1, schedule={**ONE_CYCLE, "max_lr": 0.4, "total_steps": 30})
    check_schedule(fit, 0.4, total=30)
    with pytest.raises(ConfigError, match=r"fit\.schedule: ValueError: .*31"):
        check_schedule(fit, 0.4, total=40)


def test_a_cycle_has_no_other_warm_up():
    with pytest.raises(ConfigError, match="one_cycle: the cycle begins with a warm-up of its own"):
        FitConfig(epochs=2, schedule="one_cycle", warmup_epochs=1)
