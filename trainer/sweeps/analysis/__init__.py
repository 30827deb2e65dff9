"""The question that a sweep over a whole grid answers, beyond its best trial: `sweep.analysis`."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from trainer.config import SweepConfig
from trainer.sweeps.analysis.answer import Answer, Row
from trainer.sweeps.analysis.interference import check as check_interference
from trainer.sweeps.analysis.interference import interference
from trainer.sweeps.analysis.sensitivity import check as check_sensitivity
from trainer.sweeps.analysis.sensitivity import sensitivity
from trainer.sweeps.measures import MEASURES, ON_REQUEST, requested
from trainer.sweeps.space import Space


class Analysis(NamedTuple):
    """One kind of question."""

    check: Callable[[Space, Collection[str]], None]  # of the parameters and the measures
    answer: Callable[[Sequence[Row]], Answer]  # from the completed trials


ANALYSES = {
    "interference": Analysis(check_interference, interference),
    "sensitivity": Analysis(check_sensitivity, sensitivity),
}


def check_analysis(cfg: SweepConfig, space: Space) -> None:
    """Reject a sweep whose trials cannot answer `sweep.analysis`.

    Raises:
        ConfigError: names the parameter or the measure that is missing or in the way.
    """
    if cfg.analysis is not None:
        measured = [name for name in MEASURES if name not in ON_REQUEST or name in requested(cfg)]
        ANALYSES[cfg.analysis].check(space, measured)


__all__ = ["ANALYSES", "Answer", "Row", "check_analysis", "interference", "sensitivity"]
