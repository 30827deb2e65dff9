"""The result of a run or a sweep that was started from Python."""

import csv
import functools
import json
from pathlib import Path
from typing import Any

from torch import nn

from trainer import artifact
from trainer.experiment import Experiment
from trainer.metrics import metric_names
from trainer.phases.structure import from_metadata
from trainer.report.notebook import run_html
from trainer.store.directory import METRICS, RunDirectory
from trainer.store.serialization import from_bytes


class Result:
    """A finished run.

    Attributes:
        folder: The run directory.
        experiment: The experiment that was run.
        summary: The content of summary.json.
    """

    def __init__(self, folder: Path, experiment: Experiment) -> None:
        self.folder = folder
        self.experiment = experiment
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())

    @property
    def status(self) -> str:
        """Status of the run: "done", or "limits" if its result misses a limit."""
        return str(self.summary["status"])

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics on the test set by name: of the decoded model file if there is one."""
        source = self.summary.get("artifact") or self.summary
        return {name: float(source[name]) for name in (*metric_names(self.summary), "loss")}

    @property
    def artifact(self) -> Path | None:
        """The compressed model file; None if the experiment makes none."""
        return self.folder / "model.dcz" if self.summary.get("artifact") else None

    @property
    def phases(self) -> list[dict[str, Any]]:
        """The records of the phases, as in summary.json."""
        return list(self.summary["phases"])

    @functools.cached_property
    def model(self) -> nn.Module:
        """The final model in evaluation mode: decoded from the model file if there is one."""
        if self.artifact is not None:
            content = self.artifact.read_bytes()
            weights = artifact.loads(content, coder=self.experiment.own_coder)
            metadata = artifact.read_about(content)
        else:
            weights, metadata = from_bytes((self.folder / "model.safetensors").read_bytes())
        return self.experiment.load_model(weights, from_metadata(metadata)).eval()

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value:.4f}" for name, value in self.metrics.items())
        made = self.summary.get("artifact")
        size = f", {made['bytes']:,} bytes ({made['ratio']:.1f}x smaller)" if made else ""
        return f"Result({self.status}: {values}{size}, folder={_shown(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Charts and tables of the run, which a notebook shows for a result."""
        return run_html(self.summary, RunDirectory(self.folder).entries(METRICS))


class SweepResult:
    """A finished sweep.

    Attributes:
        folder: The sweep's folder.
        summary: The content of summary.json.
        refit: The best trial run again in full, if `refit` was set.
    """

    def __init__(self, folder: Path, refit: Result | None = None) -> None:
        self.folder = folder
        self.refit = refit
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())

    @property
    def best(self) -> list[dict[str, Any]]:
        """The best trials: the ten best, or the Pareto front of several objectives.

        Each has `number`, `values` of the objectives, all `measures`, and `params`.
        """
        return list(self.summary["best"])

    @property
    def best_params(self) -> dict[str, Any]:
        """The parameters of the best trial; empty if no trial satisfies the constraints."""
        return dict(self.best[0]["params"]) if self.best else {}

    @property
    def trials(self) -> list[dict[str, str]]:
        """All trials, as rows of trials.csv."""
        with (self.folder / "trials.csv").open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {state}" for state, n in self.summary["trials"].items() if n)
        best = f", best {self.best[0]['values']} with {self.best_params}" if self.best else ""
        return f"SweepResult({counts}{best}, folder={_shown(self.folder)!r})"

    def _repr_html_(self) -> str:
        """The best trials, analysis and charts of the sweep, which a notebook shows."""
        from trainer.sweeps.notebook import sweep_html  # loads Optuna and Matplotlib

        return sweep_html(self.folder)


def _shown(folder: Path) -> str:
    """A folder relative to the working directory if it is inside it."""
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
