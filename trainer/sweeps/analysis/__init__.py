"""Analyses of all trials of a sweep, beside the search for the best one: `sweep.analysis`."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from trainer.config import SweepConfig
from trainer.messages import TRIAL_MEASURES
from trainer.sweeps.analysis.answer import Answer, Row
from trainer.sweeps.analysis.interference import check as check_interference
from trainer.sweeps.analysis.interference import interference
from trainer.sweeps.analysis.sensitivity import check as check_sensitivity
from trainer.sweeps.analysis.sensitivity import sensitivity
from trainer.sweeps.measures import MEASURES, requested
from trainer.sweeps.space import Space


class Analysis(NamedTuple):
    """One kind of analysis."""

    check: Callable[[Space, Collection[str]], None]  # raises ConfigError
    answer: Callable[[Sequence[Row]], Answer]  # from the completed trials


ANALYSES = {
    "interference": Analysis(check_interference, interference),
    "sensitivity": Analysis(check_sensitivity, sensitivity),
}


def check_analysis(cfg: SweepConfig, space: Space) -> None:
    """Refuse a sweep whose trials do not suffice for its `sweep.analysis`.

    Raises:
        ConfigError: A parameter or a measure is missing, or a parameter must not be searched.
    """
    if cfg.analysis is not None:
        left_out = {*TRIAL_MEASURES} - {*requested(cfg)}
        measured = [name for name in MEASURES if name not in left_out]
        ANALYSES[cfg.analysis].check(space, measured)


__all__ = ["ANALYSES", "Answer", "Row", "check_analysis", "interference", "sensitivity"]
