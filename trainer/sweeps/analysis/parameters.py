"""The parameters that a sweep must search for an analysis."""

from collections.abc import Collection

from trainer.errors import ConfigError
from trainer.sweeps.space import Space


def check_parameters(analysis: str, space: Space, keys: Collection[str]) -> None:
    """Refuse a sweep that searches more than `keys` and the seed, or one of them conditionally.

    Raises:
        ConfigError: The message names the parameter.
    """
    for parameter in space.parameters:
        if parameter.key not in (*keys, "seed"):
            raise ConfigError(
                f"sweep.analysis={analysis}: sweep.params also searches {parameter.key}, so the "
                "analysis would mix trials that differ in it; search it in another sweep"
            )
        if parameter.conditions:
            raise ConfigError(
                f"sweep.analysis={analysis}: sweep.conditions.{parameter.key} leaves it out of "
                "some trials, but the analysis needs it in all; remove the condition"
            )
