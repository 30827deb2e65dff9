"""The Python API: everything that `import trainer` offers."""

from trainer.experiment import Experiment
from trainer.library.result import Result, SweepResult
from trainer.library.runs import compose, load, resume, run, sweep
from trainer.library.session import Session

__all__ = [
    "Experiment",
    "Result",
    "Session",
    "SweepResult",
    "compose",
    "load",
    "resume",
    "run",
    "sweep",
]
