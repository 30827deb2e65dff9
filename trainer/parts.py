"""From a configuration to the parts of a run: data, model, and what all phases share."""

from typing import Any

from torch import nn

from trainer.config import Config
from trainer.config.instantiate import build_object
from trainer.data.dataset import generators_left_alone, seed_generators
from trainer.data.hashing import mix
from trainer.data.split import Splits
from trainer.engine.optim import parse_optimizer
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.errors import ConfigError


def build_runtime(world: World, cfg: Config) -> Runtime:
    """The world with what all phases share."""
    return Runtime(
        world=world,
        precision=cfg.precision,
        allreduce=cfg.allreduce,
        optimizer=parse_optimizer(cfg.optimizer),
        batch_size=int(cfg.data["batch_size"]),
        seed=cfg.seed,
        channels_last=cfg.channels_last,
    )


def build_data(cfg: Config) -> Splits:
    """The three splits. Raises ConfigError where the settings or the data are wrong.

    They are the same whenever and wherever they are built: what draws from the global generators
    of the CPU, such as random_split, draws by the run's seed.
    """
    with generators_left_alone():
        seed_generators(mix(cfg.seed))
        splits = build_object("data", data_settings(cfg), Splits, seed=cfg.seed)
    for name in ("train", "validation", "test"):
        if len(getattr(splits, name)) == 0:
            raise ConfigError(f"data: the {name} split is empty; give it at least one sample")
    return splits


def data_settings(cfg: Config) -> dict[str, Any]:
    """The settings that the data's target takes."""
    return {key: value for key, value in cfg.data.items() if key != "batch_size"}


def build_model(cfg: Config) -> nn.Module:
    """The model, weights drawn from the random state as it is. Raises ConfigError."""
    return build_object("model", cfg.model, nn.Module)
