"""Writes report.html of a sweep."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import optuna

from trainer.store.files import atomic_write
from trainer.sweeps.analysis import Answer


def write_report(
    path: Path,
    study: optuna.Study,
    summary: Mapping[str, Any],
    answer: Answer,
) -> None:
    """Write the best trials, the analysis and the charts of a sweep to `path`.

    Args:
        study: its trials.
        summary: the content of summary.json.
        answer: the analysis of the sweep.
    """
    from trainer.sweeps.page import page  # matplotlib is slow to import

    text = page(study, summary, answer)

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    atomic_write(path, write)
