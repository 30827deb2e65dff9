"""Creates the worker group that the setting cluster.backend names."""

from trainer.cluster.environment import prepare_environment
from trainer.cluster.group import WorkerGroup
from trainer.config import ClusterConfig


def open_group(cfg: ClusterConfig) -> WorkerGroup:
    """The group that `cluster.backend` names, not started yet."""
    if cfg.backend == "inline":
        from trainer.cluster.inline import InlineGroup

        return InlineGroup(cfg)
    prepare_environment()
    if cfg.min_workers is not None:
        from trainer.cluster.elastic import ElasticGroup

        return ElasticGroup(cfg)
    from trainer.cluster.ray_group import RayGroup

    return RayGroup(cfg)
