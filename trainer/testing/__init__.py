"""Contract suites for your own extensions: functions that check a class of yours.

They raise AssertionError, so that they can be called from a test.
"""

from trainer.sweeps.contracts import check_pruner, check_sampler
from trainer.testing.coders import check_coder
from trainer.testing.layers import check_quantized_layer
from trainer.testing.lossy import check_lossy
from trainer.testing.phases import ExampleNet, check_phase, check_structural_phase
from trainer.testing.sinks import check_sink
from trainer.testing.tasks import check_task

__all__ = [
    "ExampleNet",
    "check_coder",
    "check_lossy",
    "check_phase",
    "check_pruner",
    "check_quantized_layer",
    "check_sampler",
    "check_sink",
    "check_structural_phase",
    "check_task",
]
