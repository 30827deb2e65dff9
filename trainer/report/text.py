"""Numbers as text for readers."""

import math

NOTHING = "–"  # noqa: RUF001 - not measured, or not a number


def number(value: float | None, spec: str) -> str:
    """Format a number; None, which stands for NaN and infinity in summary.json, is `NOTHING`."""
    return NOTHING if value is None else format(value, spec)


def plural(noun: str, count: int) -> str:
    """A noun in the singular or the plural."""
    return noun if count == 1 else f"{noun}s"


def significant(value: object, digits: int = 4) -> str:
    """A value of a setting as text: floats with a few significant digits."""
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)


def perplexity(loss: float) -> float:
    """e to the power of a loss in nats; infinity if a float cannot represent it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def megabytes(count: float) -> str:
    """A number of bytes as text, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def duration(seconds: float) -> str:
    """A time as text, in its two largest units."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
