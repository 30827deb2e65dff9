"""Settings of a sweep, validated before anything starts."""

from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tests.experiments import printed
from tests.test_resume import FIT, config
from trainer.config import Config, to_dataclass
from trainer.errors import ConfigError
from trainer.store.directory import RunDirectory
from trainer.sweeps.analysis import ANALYSES, Analysis
from trainer.sweeps.plan import Plan
from trainer.sweeps.results import Results
from trainer.sweeps.space import parse_space
from trainer.sweeps.study import SweepStudy

PRUNE = {"_target_": "trainer.phases.Prune", "fit": FIT, "sparsity": 0.5, "include": ["*"]}
PHASES = {"train": {"_target_": "trainer.phases.Train", "fit": FIT}, "prune": PRUNE}
RATE = {"params": {"optimizer.lr": "choice(0.1,0.2)"}, "objectives": {"accuracy": "maximize"}}


def plan(phases=PHASES, **sweep) -> Plan:
    settings = config(phases=phases, sweep={**RATE, **sweep}).settings()
    return Plan(to_dataclass(Config, settings), OmegaConf.create(settings))


def test_a_trial_whose_length_is_not_known_is_refused() -> None:
    assert plan().check() == 4
    auto = {**PRUNE, "sparsity": "auto", "max_drop": 0.01}
    with pytest.raises(ConfigError, match=r"phases\.prune: it takes as many rounds"):
        plan({**PHASES, "prune": auto}).check()
    assert plan({**PHASES, "prune": {**auto, "rounds": 1}}).check() == 4


def test_what_only_the_winner_would_meet_is_found_before_anything_starts() -> None:
    wrong = {**PHASES, "prune": {**PRUNE, "include": ["nowhere"]}}
    overrides = {"phases.prune.include": ["*"]}
    assert plan(wrong, trial_overrides=overrides).check() == 4
    with pytest.raises(ConfigError, match=r"sweep\.refit=true: without .*nowhere"):
        plan(wrong, trial_overrides=overrides, refit=True).check()


def test_an_analysis_is_checked_and_may_change_when_the_sweep_continues() -> None:
    with pytest.raises(
        ConfigError, match=r"sweep\.analysis=sensitivity: .* phases\.prune\.include"
    ):
        plan(analysis="sensitivity")
    params = {
        "phases.prune.include": "choice(['*'])",
        "phases.prune.sparsity": "choice(0,0.5)",
        "phases.prune.fit.epochs": "choice(0,1)",
    }
    with_it = plan(params=params, analysis="sensitivity").identity()
    assert with_it == plan(params=params).identity()
    assert with_it != plan(params=params, sampler="random").identity()


def test_an_analysis_that_fails_takes_no_results_along(tmp_path, monkeypatch) -> None:
    def fail(rows):
        raise ZeroDivisionError("so it is")

    check = ANALYSES["sensitivity"].check
    monkeypatch.setitem(ANALYSES, "sensitivity", Analysis(check, fail))
    cfg = config(sweep={**RATE, "analysis": "sensitivity"}).config
    space = parse_space(cfg.sweep, {})
    ledger = SweepStudy(cfg.sweep, space, "test", 3, tmp_path, 4)
    made = SimpleNamespace(cfg=cfg, space=space, directions={"accuracy": "maximize"})
    directory = RunDirectory(tmp_path)
    directory.write_command(["+experiment=test"])
    results = Results(made, ledger, directory)  # type: ignore[arg-type]
    with pytest.raises(ZeroDivisionError):
        results.write("failed", "something else", 1.0)
    assert '"something else"' in (tmp_path / "summary.json").read_text()
    ledger.close()


@pytest.mark.parametrize("name", ["interference", "sensitivity"])
@pytest.mark.slow
def test_the_shipped_experiments_can_answer_what_they_ask(name: str) -> None:
    settings = printed(f"+experiment={name}")
    made = Plan(to_dataclass(Config, settings), OmegaConf.create(settings))
    assert made.cfg.sweep.analysis == name
