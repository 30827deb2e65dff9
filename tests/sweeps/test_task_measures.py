"""The metrics of a task as measures of a sweep."""

import pytest

from trainer.config import Config, SweepConfig
from trainer.errors import ConfigError
from trainer.sweeps.measures import check_measures, for_task, measure, not_finite, task_directions

REGRESSION = {"mae": "minimize", "r2": "maximize"}


def config(task: dict[str, object] | None = None, **sweep: object) -> Config:
    settings = {} if task is None else {"task": task}
    objectives = sweep.pop("objectives", {"accuracy": "maximize"})
    return Config(
        name="n",
        model={},
        data={"batch_size": 8},
        optimizer={},
        phases={},
        sweep=SweepConfig(objectives=objectives, **sweep),  # type: ignore[arg-type]
        **settings,  # type: ignore[arg-type]
    )


def test_directions_come_from_the_task() -> None:
    assert task_directions(config(), {}) == {"accuracy": "maximize"}
    regression = {"_target_": "trainer.tasks.Regression", "metrics": ["mae", "r2"]}
    assert task_directions(config(regression), {}) == REGRESSION
    with pytest.raises(ConfigError, match="loss=mde"):
        task_directions(config({**regression, "loss": "mde"}), {})


def test_without_accuracy_the_first_metric_is_the_default() -> None:
    found = for_task(config(), REGRESSION).sweep
    assert (found.objectives, found.metric) == ({"mae": "minimize"}, "mae")
    check_measures(found, REGRESSION)
    chosen = config(objectives={"loss": "minimize"}, metric="loss")
    assert for_task(chosen, REGRESSION).sweep == chosen.sweep
    assert for_task(config(), {"f1": "maximize", "accuracy": "maximize"}) == config()


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"objectives": {"f1": "maximize"}, "metric": "mae"}, "state its direction in sweep.obj"),
        ({"metric": "f1"}, "sweep.metric=f1: it must be one of mae, r2, loss"),
        ({"objectives": {"mae": "minimize", "f1": "maximize"}}, "f1: unknown; there are mae, r2, "),
    ],
)
def test_what_is_not_measured_is_refused(sweep: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_measures(for_task(config(**sweep), REGRESSION).sweep, REGRESSION)


def test_metrics_are_read_from_the_last_record() -> None:
    first = {"parameters": 9, "nonzero": 9, "macs": 9, "seconds": 1.0, "loss": 2.0, "mae": 1.0}
    found = measure([first, {**first, "mae": 0.5, "name": "prune"}])
    assert found["mae"] == 0.5
    assert found["seconds"] == 2.0
    assert "accuracy" not in found
    sweep = for_task(config(), REGRESSION).sweep
    assert not_finite(sweep, found) is None
    broken = not_finite(sweep, {**found, "mae": float("nan")})
    assert broken == "the mae after the last phase is nan"
