"""Notebooks: live progress in the output of a cell, and results as HTML.

The live display works in every front end that can show HTML, and without one (nbclient): it needs
no widgets. HTML output is for `_repr_html_`.
"""

import io
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import rich.console
from rich.console import RenderableType

_EVERY_S = 0.25  # between two updates of a live display
_WIDTH = 100  # columns


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")  # imported in every kernel
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookLive:
    """A live display in the output of a cell, with the interface of `rich.live.Live`.

    Args:
        get_renderable: returns what to show; None: only `update` changes it.
    """

    def __init__(self, get_renderable: Callable[[], RenderableType] | None = None) -> None:
        self._get_renderable = get_renderable
        self._renderable: RenderableType = ""
        self._handle: Any = None  # IPython's handle of the output
        self._updated = 0.0

    @property
    def is_started(self) -> bool:
        """Whether the display is shown."""
        return self._handle is not None

    def start(self) -> None:
        """Add the display to the output of the cell."""
        from IPython.display import HTML, display

        self._handle = display(HTML(""), display_id=True)
        self.refresh()

    def stop(self) -> None:
        """Remove the display."""
        if self._handle is not None:
            self._put("")
            self._handle = None

    def update(self, renderable: RenderableType, *, refresh: bool = False) -> None:
        """Replace what is shown, at once or at the next refresh."""
        self._renderable = renderable
        if refresh:
            self.refresh()

    def refresh(self) -> None:
        """Show the current state."""
        if self._handle is not None:
            self._updated = time.monotonic()
            shown = self._get_renderable() if self._get_renderable else self._renderable
            self._put(as_html(shown))

    def refresh_sometimes(self) -> None:
        """Show the current state, unless it was shown less than `_EVERY_S` ago."""
        if time.monotonic() - self._updated >= _EVERY_S:
            self.refresh()

    def _put(self, html: str) -> None:
        from IPython.display import HTML

        self._handle.update(HTML(html))


def as_html(renderable: RenderableType) -> str:
    """The output of a terminal as an HTML element."""
    console = rich.console.Console(
        record=True, width=_WIDTH, file=io.StringIO(), force_jupyter=False, highlight=False
    )
    console.print(renderable)
    code = '<pre style="font-family: monospace; line-height: 1.3; margin: 0">{code}</pre>'
    return console.export_html(inline_styles=True, code_format=code)


def run_html(summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """A finished run as an HTML element: its result, charts and tables.

    Args:
        summary: the content of summary.json.
        metrics: the lines of metrics.jsonl.
    """
    from trainer.metrics import first_metric
    from trainer.report.html import figures, render  # slow to import, with matplotlib below
    from trainer.report.page import compression_chart, highlights, learning_curves
    from trainer.report.tables import tables

    charts = learning_curves(summary, metrics)
    if summary.get("artifact"):
        charts |= compression_chart(summary["artifact"], first_metric(summary)[0])
    return render(
        "run_notebook.html.j2",
        title=summary["name"],
        status=summary["status"],
        error=summary["error"],
        highlights=highlights(summary),
        charts=figures(charts),
        tables=tables(summary),
    )
