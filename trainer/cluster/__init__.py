"""Worker groups: the processes that execute a run. The only package that imports Ray.

Neither this module nor a group's construction imports Ray or torch: the driver starts Ray first and
imports the rest meanwhile.
"""

from trainer.cluster.environment import prepare_environment
from trainer.cluster.group import Body, WorkerFailed, WorkerGroup
from trainer.cluster.restart import Loss, why_not_restart
from trainer.config import ClusterConfig

__all__ = ["Body", "Loss", "WorkerFailed", "WorkerGroup", "open_group", "why_not_restart"]


def open_group(cfg: ClusterConfig) -> WorkerGroup:
    """The group that `cluster.backend` names, not started yet."""
    if cfg.backend == "inline":
        from trainer.cluster.inline import InlineGroup

        return InlineGroup(cfg)
    prepare_environment(cfg)
    from trainer.cluster.ray_group import RayGroup

    return RayGroup(cfg)
