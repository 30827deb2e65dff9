"""The documentation of settings, read from the comments in configuration files."""

import re
from pathlib import Path

_KEY = re.compile(r"(?P<indent> *)(?P<key>[^\s#:'\"\-{\[][^:#]*):(?=\s|$)(?P<rest>.*)")
_COMMENT = re.compile(r" *# ?(?P<text>.*)")


def file_comment(path: Path) -> str:
    """The comment at the top of a configuration file, without Hydra's directives (`# @package`)."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @"):
            lines.append(line.lstrip("# ").rstrip())
    return " ".join(lines)


def key_comments(path: Path) -> dict[str, str]:
    """The comment of each key in a configuration file, by dotted key.

    A comment stands on the line of its key, and may continue on the next lines.
    """
    comments: dict[str, str] = {}
    open_keys: list[tuple[int, str]] = []  # indentation and name of the keys around a line
    dotted = ""  # the last key
    for line in path.read_text(encoding="utf-8").splitlines():
        if match := _COMMENT.fullmatch(line):
            if dotted in comments and line.startswith(" "):
                comments[dotted] += " " + match["text"].strip()
        elif match := _KEY.fullmatch(line):
            indent = len(match["indent"])
            while open_keys and open_keys[-1][0] >= indent:
                open_keys.pop()
            open_keys.append((indent, match["key"].strip()))
            dotted = ".".join(key for _, key in open_keys)
            if comment := _trailing_comment(match["rest"]):
                comments[dotted] = comment
    return comments


def _trailing_comment(rest: str) -> str:
    """The comment after a value, without its `#`. Within quotes, or a word, # begins no comment."""
    quote = ""
    for at, letter in enumerate(rest):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and (at == 0 or rest[at - 1] in " [{,"):
            quote = letter
        elif letter == "#" and (at == 0 or rest[at - 1] in " \t"):
            return rest[at + 1 :].strip()
    return ""
