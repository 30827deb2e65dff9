"""Names and values of a sweep as shown in the terminal, the report and charts."""

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.report.text import significant

_LEFT_OUT = ("phases", "overrides", "fit")  # parts of a key that are not shown


def short_names(names: Iterable[str]) -> dict[str, str]:
    """Shorten the names of parameters: `phases.prune.overrides.fc1` becomes `prune.fc1`.

    Names that would no longer differ stay as they are.
    """
    names = list(names)
    short = {
        name: ".".join(part for part in name.split(".") if part not in _LEFT_OUT) for name in names
    }
    found = list(short.values())
    return {name: text if text and found.count(text) == 1 else name for name, text in short.items()}


def format_settings(drawn: Mapping[str, Any]) -> str:
    """The drawn values of a trial in one line, with three significant digits."""
    names = short_names(drawn)
    return ", ".join(f"{names[name]}={significant(value, 3)}" for name, value in drawn.items())


def format_measure(name: str, value: float) -> str:
    """The value of an objective, as its kind is usually written.

    Args:
        name: of trainer.sweeps.measures.
    """
    if name.endswith("accuracy"):
        return f"{value:.2%}"
    match name:
        case "bytes" | "parameters" | "nonzero" | "macs" | "tpu_cycles" | "eie_cycles":
            return f"{value:,.0f}"
        case "seconds":
            return f"{value:.1f} s"
    return significant(float(value))


def format_values(names: Iterable[str], values: Iterable[float]) -> str:
    """The values of all objectives in one line."""
    pairs = zip(names, values, strict=True)
    return ", ".join(f"{name} {format_measure(name, value)}" for name, value in pairs)
