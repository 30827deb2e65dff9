"""Tables of published and simulated figures."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ComparisonTable:
    """A table as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table in Markdown, its title in bold above it and its note below it."""
        lines = [f"**{self.title}**", "", _line(self.header), _line(["---"] * len(self.header))]
        lines += map(_line, self.rows)
        return "\n".join([*lines, "", self.note] if self.note else lines)


def compare(
    title: str, figures: Iterable[tuple[str, float, float]], note: str = ""
) -> ComparisonTable:
    """A table of single figures: what, paper, ours."""
    rows = []
    for what, paper, ours in figures:
        digits = 0 if paper >= 1000 else 2
        numbers = f"{paper:,.{digits}f}", f"{ours:,.{digits}f}"
        rows.append((what, *numbers, percent(ours, paper)))
    return ComparisonTable(title, ("figure", "paper", "ours", "difference"), tuple(rows), note)


def percent(ours: float, paper: float) -> str:
    """By how much a figure differs from a published one."""
    return f"{ours / paper - 1:+.1%}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
