"""A table as text, and how it is fitted to the width of a terminal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import rich.box
import rich.table
from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.text import Text

_MIN_NAME = 12  # minimum width of the names, in characters
_GAP = 2  # characters between two columns


@dataclass(frozen=True)
class Table:
    """One table as text. The first column holds names."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    caption: str = ""
    optional: tuple[str, ...] = ()  # columns that are left out in a narrow terminal, in this order
    prose: tuple[str, ...] = ()  # columns of text, which may wrap; the others hold numbers


def as_dict(table: Table) -> dict[str, Any]:
    """A table for summary.json."""
    return {
        "title": table.title,
        "columns": table.columns,
        "rows": table.rows,
        "caption": table.caption,
    }


def rich_table(table: Table, width: int) -> RenderableType:
    """A table for a terminal, with as many columns as fit.

    A table that is too wide first loses its optional columns, which the caption then names;
    after that its names are shortened.

    Args:
        width: of the terminal, in characters.
    """
    shown, dropped = _fit(table, width)
    result = rich.table.Table(
        box=rich.box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
        header_style="bold cyan",
    )
    for index in shown:
        prose = index == 0 or table.columns[index] in table.prose
        result.add_column(
            escape(table.columns[index]),
            justify="left" if prose else "right",
            no_wrap=index == 0 or not prose,
            overflow="ellipsis" if index == 0 else "fold",
            min_width=None if prose else cell_len(table.columns[index]),
            style="bold" if index == 0 else "",
        )
    for row in table.rows:
        result.add_row(*(escape(row[index]) for index in shown))
    parts: list[RenderableType] = [Text(table.title, "bold")] if table.title else []
    caption = [line for line in table.caption.splitlines() if line]
    if dropped:
        caption.append(f"too narrow for: {', '.join(dropped)} (in report.html)")
    captions = [Text(line, "dim") for line in caption]
    return Group(Text(""), *parts, result, *captions)


def _fit(table: Table, width: int) -> tuple[list[int], list[str]]:
    """The indices of the columns that fit, and the names of those left out."""
    widths = [
        max(cell_len(cell) for cell in (title, *(row[index] for row in table.rows)))
        for index, title in enumerate(table.columns)
    ]
    for index, title in enumerate(table.columns):
        if title in table.prose:
            widths[index] = min(widths[index], 3 * _MIN_NAME)
    shown, dropped = list(range(len(widths))), []
    for name in table.optional:
        if sum(widths[index] + _GAP for index in shown) - _GAP <= width:
            break
        if name in table.columns:
            shown.remove(table.columns.index(name))
            dropped.append(name)
    return shown, dropped
