"""Worker groups: the processes that execute a run. The only package that imports Ray.

Importing this package or constructing a group imports neither Ray nor torch, so that the driver can
start Ray first and import torch and the user's code while Ray starts.
"""

from trainer.cluster.fleet import Fleet
from trainer.cluster.group import (
    ClusterLost,
    InsufficientResources,
    Reformed,
    Step,
    WorkerFailed,
    WorkerFunction,
    WorkerGroup,
)
from trainer.cluster.open import open_group
from trainer.cluster.restart import WorkerLoss, why_not_restart

__all__ = [
    "ClusterLost",
    "Fleet",
    "InsufficientResources",
    "Reformed",
    "Step",
    "WorkerFailed",
    "WorkerFunction",
    "WorkerGroup",
    "WorkerLoss",
    "open_group",
    "why_not_restart",
]
