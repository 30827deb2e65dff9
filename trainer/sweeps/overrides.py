"""Writes settings in Hydra's override grammar, so that a command line reproduces a trial."""

import re
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*|0|[1-9][0-9]*")  # a part of a dotted key
_PLAIN_TEXT = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
_KEYWORDS = ("true", "false", "null", "inf", "nan")  # in upper or lower case; not strings
_ESCAPED = re.compile(r"([\\()\[\]{}:=, \t])")  # escaped in a key of a mapping


def override(key: str, value: Any) -> str | None:
    """The argument `key=value` that sets a dotted key.

    Args:
        value: None, a bool, a number, a text, or lists and mappings of these.

    Returns:
        None where the grammar cannot express it: keys of mappings cannot be quoted, so that they
        cannot contain quotes or letters outside ASCII.
    """
    parts = key.split(".")
    # Parts of a key that are not names, such as conv*, are keys of a mapping.
    odd = next((i for i, part in enumerate(parts) if not _PLAIN_KEY.fullmatch(part)), len(parts))
    if odd == 0:
        return None
    nested = value
    for part in reversed(parts[odd:]):
        nested = {part: nested}
    written = f"{'.'.join(parts[:odd])}={hydra_text(nested)}"
    try:
        parsed = OverridesParser.create().parse_override(written)
    except HydraException:
        return None
    return written if repr(parsed.value()) == repr(_plain(nested)) else None


def hydra_text(value: Any) -> str:
    """A value as Hydra's grammar reads it; values that differ in their type have different texts.

    Args:
        value: None, a bool, a number, a text, or lists and mappings of these.
    """
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int() | float():
            return repr(value)
        case list() | tuple():
            return "[" + ",".join(hydra_text(item) for item in value) + "]"
        case dict():
            pairs = (f"{_mapping_key(key)}:{hydra_text(item)}" for key, item in value.items())
            return "{" + ",".join(pairs) + "}"
    text = str(value)
    if _PLAIN_TEXT.fullmatch(text) and text.lower() not in _KEYWORDS:
        return text
    return QuotedString(text, Quote.single).with_quotes()


def _mapping_key(key: Any) -> str:
    return _ESCAPED.sub(r"\\\1", key) if isinstance(key, str) else hydra_text(key)


def _plain(value: Any) -> Any:
    match value:
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {key: _plain(item) for key, item in value.items()}
    return value
