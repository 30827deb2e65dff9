"""Settings: their types and documentation, and the objects that they describe."""

from trainer.config.instantiate import typed
from trainer.config.schema import (
    PRECISIONS,
    SCHEDULES,
    AllReduceConfig,
    ArtifactConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    DistillConfig,
    ExportConfig,
    FitConfig,
    LimitsConfig,
    SweepConfig,
    at_least,
    file_name,
    one_of,
)

__all__ = [
    "PRECISIONS",
    "SCHEDULES",
    "AllReduceConfig",
    "ArtifactConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "DistillConfig",
    "ExportConfig",
    "FitConfig",
    "LimitsConfig",
    "SweepConfig",
    "at_least",
    "file_name",
    "one_of",
    "typed",
]
