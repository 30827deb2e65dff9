"""Settings: their types and documentation, and the objects that they describe."""

from trainer.config.instantiate import to_dataclass
from trainer.config.schema import (
    PRECISIONS,
    SCHEDULES,
    AllReduceConfig,
    ArtifactConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    CostConfig,
    DistillConfig,
    ExportConfig,
    FitConfig,
    LimitsConfig,
    SweepConfig,
    check_choice,
    check_file_name,
    check_min,
)

__all__ = [
    "PRECISIONS",
    "SCHEDULES",
    "AllReduceConfig",
    "ArtifactConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "Config",
    "CostConfig",
    "DistillConfig",
    "ExportConfig",
    "FitConfig",
    "LimitsConfig",
    "SweepConfig",
    "check_choice",
    "check_file_name",
    "check_min",
    "to_dataclass",
]
