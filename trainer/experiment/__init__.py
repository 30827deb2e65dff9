"""One experiment, built and validated once, from a configuration or from Python objects.

The driver, the workers, sweeps and reports all receive an `Experiment`. Only this package turns
settings into objects; nothing above it reads plain settings.
"""

from trainer.experiment.checks import check_model, check_phases
from trainer.experiment.describe import (
    describe_cluster,
    describe_object,
    describe_parts,
    describe_section,
)
from trainer.experiment.experiment import Experiment
from trainer.experiment.phases import Stage, check_order
from trainer.experiment.weights import encode_artifact, initial_weights

__all__ = [
    "Experiment",
    "Stage",
    "check_model",
    "check_order",
    "check_phases",
    "describe_cluster",
    "describe_object",
    "describe_parts",
    "describe_section",
    "encode_artifact",
    "initial_weights",
]
