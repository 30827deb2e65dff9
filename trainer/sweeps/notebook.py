"""The result of a sweep as HTML, for `_repr_html_` in a notebook."""

import json
from pathlib import Path
from typing import Any

import optuna

from trainer.report.html import figures, render
from trainer.report.table import Table
from trainer.store.directory import RunDirectory
from trainer.sweeps.page import best_table, charts, highlights
from trainer.sweeps.study import close_storage, open_storage


def sweep_html(folder: Path) -> str:
    """The result of a sweep as an HTML element: its best trials, analysis and charts.

    Args:
        folder: of the sweep, with summary.json and config.yaml.

    Raises:
        OSError, ValueError: there is no summary.
        Exception: an error of the database that holds the trials.
    """
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    storage = open_storage(RunDirectory(folder).read_config()["sweep"]["storage"], folder)
    try:
        name = f"{summary['name']}/{summary['sweep']}"
        sections = charts(optuna.load_study(study_name=name, storage=storage))
    finally:
        close_storage(storage)
    analysis = summary.get("analysis", {})
    return render(
        "sweep_notebook.html.j2",
        title=f"{summary['name']}/{summary['sweep']}",
        status=summary["status"],
        error=summary["error"],
        highlights=highlights(summary),
        tables=[*(Table(**table) for table in analysis.get("tables", [])), best_table(summary)],
        sentences=analysis.get("sentences", []),
        sections=[(title, figures(svgs)) for title, svgs in sections.items()],
    )
