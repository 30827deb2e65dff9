"""What a sweep over a whole grid answers, beyond the best trial: `sweep.analysis`."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from trainer.config import SweepConfig
from trainer.sweeps.analysis.answer import Answer, Row
from trainer.sweeps.analysis.interference import check as check_interference
from trainer.sweeps.analysis.interference import interference
from trainer.sweeps.analysis.sensitivity import check as check_sensitivity
from trainer.sweeps.analysis.sensitivity import sensitivity
from trainer.sweeps.measures import MEASURES, needs_artifact
from trainer.sweeps.space import Space


class Analysis(NamedTuple):
    """One kind of question."""

    check: Callable[[Space, Collection[str]], None]  # of what is searched and measured
    answer: Callable[[Sequence[Row]], Answer]  # from the trials that were completed


ANALYSES = {
    "interference": Analysis(check_interference, interference),
    "sensitivity": Analysis(check_sensitivity, sensitivity),
}


def check_analysis(cfg: SweepConfig, space: Space) -> None:
    """Refuse a sweep that could not answer what `sweep.analysis` asks. Raises ConfigError."""
    if cfg.analysis is not None:
        measured = [name for name in MEASURES if name != "bytes" or needs_artifact(cfg)]
        ANALYSES[cfg.analysis].check(space, measured)


__all__ = ["ANALYSES", "Answer", "Row", "check_analysis", "interference", "sensitivity"]
