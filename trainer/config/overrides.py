"""Settings whose keys are free, on the command line: sweep.params.model.depth=range(1,5).

Hydra asks for a + before a key that is not there yet. In a mapping whose keys are names of layers
or settings, that helps nobody. The keys of `sweep.params` are themselves dotted keys of the
configuration, and Hydra would treat their values as a sweep of its own. So such arguments are
rewritten before Hydra reads them.
"""

import re
from collections.abc import Mapping
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig

from trainer.errors import ConfigError

# These mappings have no fixed keys: a new key needs no +.
_OPEN = re.compile(
    r"(sweep\.(params|lengths|conditions|trial_overrides|objectives|constraints)"
    r"|phases\.[^.=]+\.(overrides|clusters|fit\.freeze)|optimizer\.groups)[.=]"
)
# The keys of these have dots.
_DOTTED = re.compile(
    r"\+{0,2}sweep\.(params|lengths|conditions|trial_overrides)\.([^=]+)=(.*)", re.DOTALL
)
_PARAMS = re.compile(r"\+{0,2}sweep\.params=(.*)", re.DOTALL)


def as_hydra(argument: str) -> str:
    """An argument in the form that Hydra accepts.

    Raises:
        ConfigError: it is a mapping whose ranges are not in quotes.
    """
    if matched := _PARAMS.fullmatch(argument):
        _check_quoted(_parsed(matched[1]))
    elif matched := _DOTTED.fullmatch(argument):
        section, key, text = matched.groups()
        if isinstance(_parsed(text), Sweep):
            text = QuotedString(text, Quote.single).with_quotes()
        return f"++sweep.{section}={{{key}: {text}}}"
    return f"++{argument}" if _OPEN.match(argument) else argument


def drop_nested(arguments: list[str], composed: DictConfig) -> None:
    """Remove nested keys of a file that an argument gives in dotted form."""
    for argument in arguments:
        if matched := _DOTTED.fullmatch(argument):
            section, key, _ = matched.groups()
            *path, last = key.split(".")
            here: Any = composed.sweep[section]
            for part in path:
                here = here.get(part) if isinstance(here, DictConfig) else None
            if path and isinstance(here, DictConfig):
                here.pop(last, None)


def _parsed(text: str) -> Any:
    """The value of an argument; None if it is invalid, which Hydra reports later."""
    try:
        return OverridesParser.create().parse_override(f"x={text}").value()
    except HydraException:
        return None


def _check_quoted(value: Any, keys: tuple[str, ...] = ()) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_quoted(item, (*keys, str(key)))
    elif isinstance(value, Sweep):
        key = ".".join(keys)
        raise ConfigError(
            f"sweep.params: put the range of {key} in quotes, as in "
            f"'sweep.params={{{key}: \"range(1,5)\"}}', or write sweep.params.{key}=range(1,5)"
        )
