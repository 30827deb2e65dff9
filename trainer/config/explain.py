"""Errors of Hydra and OmegaConf in one line that says what to write instead."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from hydra.errors import OverrideParseException

from trainer.errors import first_line

_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
_INNER_KEY = re.compile(r"full_key: (\S+)")
_UNKNOWN_CHOICE = re.compile(r"Could not (?:find|load) '([^']+)/([^'/]*)'")
_SEVERAL_VALUES = re.compile(r"Ambiguous value for argument '([^=']+)=(.*)'\n")
_MISSING = re.compile(r"Missing mandatory value: (\S+)")
_CHOSEN_TWICE = re.compile(r"Multiple values for (\w+)\. To override")
_NO_EQUALS = re.compile(r"Error parsing override '([^=']*)'\nmissing EQUAL")
_COMMANDS = ("doctor", "artifact", "hardware", "inference", "lecture", "resume=RUN_DIR", "--help")


def explain(error: Exception, keys: Callable[[], list[str]], folders: Sequence[Path] = ()) -> str:
    """The message of an error of Hydra or OmegaConf in one line.

    Args:
        error: The error.
        keys: Returns the dotted keys of the configuration without the override that failed.
        folders: Those with configuration files.
    """
    text = str(error)
    if match := _UNKNOWN_KEY.match(text):
        key = match[1]
        if "No match in the defaults list" in text:
            return f"{key}=...: an experiment does not set this group yet: write +{key}=..."
        inner = _INNER_KEY.search(str(error.__cause__))
        if inner and inner[1].startswith(f"{key}."):  # the override is a mapping: limits={speed: 1}
            key = inner[1]
        return f"{key}: there is no such setting{_advice(key, keys())}"
    if match := _UNKNOWN_CHOICE.search(text):
        group, name = match.groups()
        known = sorted({path.stem for folder in folders for path in folder.glob(f"{group}/*.yaml")})
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{group}/{name}: there is no such file; {hint}there are {', '.join(known)}"
    if match := _SEVERAL_VALUES.search(text):
        key, values = match.groups()
        return (
            f"{key}={values}: these are several values; write {key}=[{values}] for a list, "
            f"\"{key}='{values}'\" for a text, or sweep.params.{key}=choice({values}) to search"
        )
    if match := _MISSING.search(text):
        key, full_key = match[1], str(getattr(error, "full_key", None))
        if full_key.endswith(f".{key}"):
            return f"{full_key} is missing: set {full_key}=..."
        return f"{key} is missing: choose an experiment with +experiment=NAME, or set {key}=..."
    if match := _NO_EQUALS.match(text):
        close = difflib.get_close_matches(match[1], _COMMANDS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        return (
            f"{match[1]}: it is not of the form key=value; {hint}an experiment is +experiment=NAME"
        )
    if match := _CHOSEN_TWICE.match(text):
        return f"{match[1]} is chosen twice: write +{match[1]}=NAME once"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: it cannot be read ({_parser_message(error)}); put a text with "
            "special characters in quotes of its own, as in 'key=\"a=b\"'"
        )
    return with_cause(error)


def _parser_message(error: OverrideParseException) -> str:
    """The message of Hydra's parser, without the tokens that it expected."""
    message = error.message or str(error)
    return first_line(ValueError(message.partition(" expecting ")[0]))


def with_cause(error: Exception) -> str:
    """The message of a Hydra error and of its cause, on one line."""
    text = str(error).partition("Config search path")[0].partition("\nSee https://hydra.cc")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if error.__cause__ and first_line(error.__cause__) not in text:
        lines.append(first_line(error.__cause__))
    return " ".join(lines)


def _advice(key: str, known: Iterable[str]) -> str:
    """A suggestion for a key that does not exist."""
    keys = [*known]
    if key.startswith("phases.") and (advice := _advice_on_phase(key, keys)):
        return advice
    section, _, last = key.rpartition(".")
    inner = [name for name in keys if name.startswith(f"{section}.") and name.endswith(f".{last}")]
    almost = difflib.get_close_matches(key, keys, 1, cutoff=0.95)
    longer = [name for name in keys if name.startswith(f"{key}_")]
    if section and (likely := inner or almost or longer):
        return f"; did you mean {likely[0]}?"
    sections = {name[: match.start()] for name in keys for match in re.finditer(r"\.", name)}
    close = difflib.get_close_matches(key, [*keys, *sections], 1, cutoff=0.75)
    if not close:  # the right name in the wrong section
        close = [name for name in keys if name.rpartition(".")[2] == last][:1]
    if close:
        return f"; did you mean {close[0]}?"
    siblings = [name for name in keys if name.rpartition(".")[0] == section]
    if siblings and section:
        names = [name.rpartition(".")[2] for name in siblings]
        known = ", ".join(name for name in names if name != "_target_")
        more = f"; +{key}=... passes a further argument" if "_target_" in names else ""
        return f"; {section} has {known}{more}"
    return "; --help lists the settings of an experiment"


def _advice_on_phase(key: str, keys: Sequence[str]) -> str:
    """A suggestion for a setting of a phase that the experiment does not have; "" if it has it."""
    _, phase, *rest = key.split(".")
    names = dict.fromkeys(name.split(".")[1] for name in keys if name.startswith("phases."))
    if phase in names or not names:
        return ""
    if close := difflib.get_close_matches(phase, names, 1):
        return f"; did you mean {'.'.join(['phases', close[0], *rest])}?"
    return (
        f"; the phases of this experiment are {', '.join(names)}; "
        f"+phase@phases.{phase}=KIND adds one at the end"
    )
