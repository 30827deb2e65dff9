"""An exhibit of the lecture, the runs that it needs, and what these runs left."""

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from trainer.config import Config
from trainer.store.files import atomic_write
from trainer.sweeps.analysis import Answer, Row
from trainer.sweeps.measures import MEASURES

_SETTINGS = {field.name for field in fields(Config)}

CIFAR10 = "CIFAR10"  # in the overrides of a job: replaced by the folder of the images


@dataclass(frozen=True)
class Job:
    """One run or sweep: a command of the trainer, whose results are in a folder of its own.

    Exhibits with equal jobs share the results.
    """

    name: str  # of the folder
    experiment: str | None  # None: the overrides state everything
    overrides: tuple[str, ...] = ()
    short: tuple[str, ...] = ()  # more overrides of the short version

    def arguments(self, short: bool, cifar10: Path | None = None) -> list[str]:
        """The arguments of `python -m trainer`, without the folder."""
        first = [] if self.experiment is None else [f"+experiment={self.experiment}"]
        found = [*first, *self.overrides, *(self.short if short else ())]
        folder = "DIR" if cifar10 is None else str(cifar10)
        return [argument.replace(CIFAR10, folder) for argument in found]

    @property
    def needs_cifar10(self) -> bool:
        """Whether the images of CIFAR-10 are needed."""
        return any(CIFAR10 in override for override in self.overrides)


class Results:
    """What the jobs of a lecture left in its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def job(self, job: Job | str) -> Path:
        """The folder of a job."""
        return self.folder / "runs" / (job if isinstance(job, str) else job.name)

    def summary(self, job: Job | str) -> dict[str, Any]:
        """The content of a job's summary.json; empty if it has not ended."""
        found = _read(self.job(job) / "summary.json")
        return found if isinstance(found, dict) else {}

    def is_done(self, job: Job) -> bool:
        """Whether a job has nothing left to do."""
        return self.summary(job).get("status") in ("done", "limits")

    def rows(self, job: Job | str) -> list[Row]:
        """The completed trials of a sweep."""
        with (self.job(job) / "trials.csv").open(newline="", encoding="utf-8") as file:
            trials = [row for row in csv.DictReader(file) if row["state"] == "COMPLETE"]
        return [
            Row(
                {
                    key: yaml.safe_load(text)
                    for key, text in row.items()
                    if key.partition(".")[0] in _SETTINGS
                },
                {key: float(row[key]) for key in MEASURES if row.get(key)},
            )
            for row in trials
        ]

    def measured(self, exhibit: str) -> Any:
        """What the exhibit's own measurement returned; None: it has not been made."""
        return _read(self.folder / "measured" / f"{exhibit}.json")

    def keep(self, exhibit: str, measured: Any) -> None:
        """Store what the exhibit's own measurement returned."""
        path = self.folder / "measured" / f"{exhibit}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = json.dumps(measured, indent=1).encode()
        atomic_write(path, lambda file: file.write(content))


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@dataclass(frozen=True)
class Exhibit:
    """A figure or a table of the lecture.

    Attributes:
        name: For the command line.
        title: For the page.
        text: What is shown, in a sentence or two.
        source: Of the published values.
        minutes: Expected duration on two cores, measured once.
        show: Makes tables, charts and conclusions of the results.
        jobs: What has to be run.
        measure: What else has to be measured, after the jobs: a function of their results and of
            whether the version is the short one. It returns what JSON can hold.
    """

    name: str
    title: str
    text: str
    source: str
    minutes: float
    show: Callable[[Results], Answer]
    jobs: tuple[Job, ...] = ()
    measure: Callable[[Results, bool], Any] | None = None

    @property
    def needs_cifar10(self) -> bool:
        """Whether the images of CIFAR-10, which do not ship with the package, are needed."""
        return any(job.needs_cifar10 for job in self.jobs)

    def is_done(self, results: Results) -> bool:
        """Whether all results are there."""
        measured = self.measure is None or results.measured(self.name) is not None
        return measured and all(map(results.is_done, self.jobs))


def shown(
    exhibits: Mapping[str, Exhibit], results: Results
) -> Iterator[tuple[Exhibit, Answer | None]]:
    """Each exhibit with its tables and charts; None: not all of its results are there."""
    for exhibit in exhibits.values():
        yield exhibit, exhibit.show(results) if exhibit.is_done(results) else None
