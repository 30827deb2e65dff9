"""What a sweep must search for an analysis to tell its trials apart."""

from collections.abc import Collection

from trainer.errors import ConfigError
from trainer.sweeps.space import Space


def check_searched(analysis: str, space: Space, keys: Collection[str]) -> None:
    """Refuse a sweep that searches more than `keys` and the seed, or one of them only sometimes.

    Raises:
        ConfigError: names the parameter.
    """
    for parameter in space.parameters:
        if parameter.key not in (*keys, "seed"):
            raise ConfigError(
                f"sweep.analysis={analysis}: sweep.params.{parameter.key} is searched besides, and "
                "the answer would mix up trials that differ in it; search it in another sweep"
            )
        if parameter.conditions:
            raise ConfigError(
                f"sweep.analysis={analysis}: sweep.conditions.{parameter.key} leaves it out of "
                "some trials, and the answer needs it in all; take the condition away"
            )
