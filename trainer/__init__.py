"""Train neural networks on many workers, and compress them to small, verified model files.

    import trainer
    from trainer.models import LeNet5
    from trainer.phases import Prune, Retrain, Share, Train

    result = trainer.run(
        model=LeNet5(),
        data=trainer.data.mnist(),
        phases=[Train(epochs=2), Prune(0.9), Retrain(epochs=1), Share(bits=5)],
        artifact=True,
    )
    print(result.metrics, result.artifact)

Names are imported when they are used, so that the command can start Ray before it imports torch.
"""

from importlib import import_module
from typing import Any

from trainer.imports import collector_paused
from trainer.version import __version__

_LIBRARY = (
    "Experiment",
    "Result",
    "Session",
    "SweepResult",
    "compose",
    "load",
    "resume",
    "run",
    "sweep",
)
_ERRORS = ("ConfigError", "Interrupted", "LimitsMissed", "RunError")
_MODULES = ("artifact", "config", "data", "inference", "models", "phases", "tasks", "testing")

__all__ = ["__version__", *_ERRORS, *_LIBRARY, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _ERRORS:
        return getattr(import_module("trainer.errors"), name)
    with collector_paused():
        if name in _MODULES:
            return import_module(f"trainer.{name}")
        if name in _LIBRARY:
            return getattr(import_module("trainer.library"), name)
    raise AttributeError(f"module 'trainer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
