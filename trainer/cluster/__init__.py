"""Worker groups: the processes that execute a run. The only package that imports Ray.

Neither this module nor a group's construction imports Ray or torch: the driver starts Ray first and
imports the rest meanwhile.
"""

from trainer.cluster.fleet import Fleet
from trainer.cluster.group import Body, NoRoom, WorkerFailed, WorkerGroup
from trainer.cluster.open import open_group
from trainer.cluster.restart import Loss, why_not_restart

__all__ = [
    "Body",
    "Fleet",
    "Loss",
    "NoRoom",
    "WorkerFailed",
    "WorkerGroup",
    "open_group",
    "why_not_restart",
]
