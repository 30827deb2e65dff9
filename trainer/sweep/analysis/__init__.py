"""What a sweep over a whole grid answers, beyond the best trial: `sweep.analysis`."""

from collections.abc import Callable, Sequence

from trainer.sweep.analysis.answer import Answer, Row
from trainer.sweep.analysis.interference import interference
from trainer.sweep.analysis.sensitivity import sensitivity

ANALYSES: dict[str, Callable[[Sequence[Row]], Answer]] = {
    "interference": interference,
    "sensitivity": sensitivity,
}

__all__ = ["ANALYSES", "Answer", "Row", "interference", "sensitivity"]
