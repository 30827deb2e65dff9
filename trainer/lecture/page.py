"""The page of the lecture: every exhibit beside the published values."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.lecture.exhibit import Exhibit, Results, shown
from trainer.report.html import figures, render
from trainer.sweeps.analysis import Answer


def page(
    exhibits: Mapping[str, Exhibit],
    results: Results,
    *,
    short: bool,
    cifar10: Path | None,
    command: str,
    failed: Mapping[str, str],
    date: str,
) -> str:
    """Render the page.

    Args:
        exhibits: All exhibits by name, in order.
        results: Of the runs so far.
        short: Whether the runs were shrunk, so that their figures mean nothing.
        cifar10: Folder of the images of CIFAR-10.
        command: The command line.
        failed: Why an exhibit could not be completed, by name.
        date: Of this page.
    """
    sections: list[dict[str, Any]] = []
    for exhibit, answer in shown(exhibits, results):
        command_line = f"python -m trainer.lecture{' --short' * short} --only {exhibit.name}"
        command_line += " --cifar10 DIR" * exhibit.needs_cifar10
        reason = None if answer else f"Not run yet: {command_line}"
        answer = answer or Answer()
        sections.append(
            {
                "exhibit": exhibit,
                "missing": failed.get(exhibit.name, reason),
                "tables": answer.tables,
                "charts": figures({caption: draw() for caption, draw in answer.figures.items()}),
                "sentences": answer.sentences,
                "commands": [
                    shlex.join(["python", "-m", "trainer", *job.arguments(short, cifar10)])
                    for job in exhibit.jobs
                ],
            }
        )
    complete = sum(section["missing"] is None for section in sections)
    done = complete == len(sections)
    text = "done" if done else f"{complete} of {len(sections)} exhibits"
    return render(
        "lecture.html.j2",
        title="Deep Learning: Time and Memory Efficiency",
        status="done" if done else "interrupted",
        status_text=text + (", short version: the figures mean nothing" if short else ""),
        date=date,
        command=command,
        error=None,
        highlights=[],
        sections=sections,
    )
