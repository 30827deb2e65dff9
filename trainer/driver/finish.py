"""What becomes of a run that got to its end: judged, put on a page, shown."""

import contextlib
import traceback
from collections.abc import Mapping
from typing import Any

from trainer.config import Config
from trainer.driver.limits import missed
from trainer.errors import LimitsMissed, first_line
from trainer.report.tables import rich_table, tables
from trainer.report.terminal import Console
from trainer.store.directory import RunDirectory


def judged(summary: Mapping[str, Any], cfg: Config) -> dict[str, Any]:
    """The summary of a run that got to its end, with what the limits say of it."""
    error = "; ".join(missed(summary, cfg.limits)) or None
    return {**summary, "status": "limits" if error else "done", "error": error}


def leave_page(
    summary: Mapping[str, Any], cfg: Config, directory: RunDirectory, console: Console
) -> None:
    """Leave report.html. The run is done: what goes wrong here is said, and changes nothing."""
    from trainer.driver.page import write_page  # slow to import

    try:
        write_page(summary, cfg, directory, console.say)
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk may be the reason
            directory.log(traceback.format_exc())
        console.say(f"report.html could not be written: {first_line(error)} (more in log.txt)")


def show(summary: Mapping[str, Any], directory: RunDirectory, console: Console) -> None:
    """Show a finished run. Raises LimitsMissed."""
    for table in tables(summary):
        console.terminal.print(rich_table(table))
    console.say(f"results in {directory.path}")
    if summary["status"] == "limits":
        raise LimitsMissed(summary["error"])
