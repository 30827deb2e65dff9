"""Curves as comma-separated values, in the file curves.csv of the run."""

import csv
from collections.abc import Mapping
from pathlib import Path

from trainer.report.sinks.base import ScalarSink
from trainer.store.files import atomic_write

_HEADER = ("step", "name", "value")


class CsvSink(ScalarSink):
    """Writes curves.csv with the columns step, name and value.

    Args:
        folder: The run directory.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._path = folder / "curves.csv"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows((step, name, value) for name, value in values.items())

    def rewind(self, step: int) -> None:
        rows = [row for row in self._rows() if int(row[0]) <= step]
        text = "".join(f"{','.join(row)}\r\n" for row in [_HEADER, *rows])
        atomic_write(self._path, lambda file: file.write(text.encode()))

    def _rows(self) -> list[list[str]]:
        """The rows recorded so far, without an incomplete one that a killed driver left."""
        if not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit()]
