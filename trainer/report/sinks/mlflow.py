"""Curves, settings and files in MLflow. Needs the extra `mlflow`."""

import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError
from trainer.messages import Message, RunEnded
from trainer.report.sinks.base import ScalarSink
from trainer.report.sinks.identity import run_id

_TAG = "trainer.run_id"
_STATUS = {"done": "FINISHED", "limits": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_MAX_VALUE = 6000  # characters of a parameter that every store accepts


class MlflowSink(ScalarSink):
    """Records a run in MLflow: settings as parameters, curves as metrics, the summary as a file.

    Args:
        folder: The run directory.
        name: Title of the run.
        settings: All settings of the run.
        group: Name of the sweep that the run is a trial of.
        experiment: Name of the MLflow experiment.
        tracking_uri: Where MLflow stores runs; None: the value of the environment
            variable MLFLOW_TRACKING_URI, or else a database file outputs/mlflow.db.
        files: Files of the run directory that are stored with the run at its end.

    Raises:
        ConfigError: mlflow is not installed.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        group: str | None = None,
        experiment: str = "trainer",
        tracking_uri: str | None = None,
        files: tuple[str, ...] = ("config.yaml", "model.dcz"),
    ) -> None:
        super().__init__()
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ConfigError(
                "logger=mlflow: mlflow is missing; run pip install '.[mlflow]' in the checkout"
            ) from error
        self._metric = Metric
        self._folder = folder
        self._files = files
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _local_store(Path("outputs"))
        self._client = MlflowClient(tracking_uri=uri)
        self._id = self._find_or_create(experiment, name, run_id(folder), group, uri)
        params = [Param(key, str(value)[:_MAX_VALUE]) for key, value in _flatten(settings)]
        known = self._client.get_run(self._id).data.params
        self._client.log_batch(self._id, params=[p for p in params if p.key not in known])

    def _find_or_create(
        self, experiment: str, name: str, own_id: str, group: str | None, uri: str
    ) -> str:
        """The MLflow run of this run: an existing one if the run is resumed."""
        found = self._client.get_experiment_by_name(experiment)
        if found is None:
            location = None
            if uri.startswith("sqlite:"):
                location = (Path("outputs") / "mlflow").absolute().as_uri()
            experiment_id = self._client.create_experiment(experiment, artifact_location=location)
        else:
            experiment_id = found.experiment_id
        earlier = self._client.search_runs([experiment_id], f"tags.`{_TAG}` = '{own_id}'")
        if earlier:
            self._client.update_run(earlier[0].info.run_id, status="RUNNING")
            return str(earlier[0].info.run_id)
        tags = {_TAG: own_id, **({"group": group} if group else {})}
        run = self._client.create_run(experiment_id, run_name=name, tags=tags)
        return str(run.info.run_id)

    def on(self, message: Message) -> None:
        """Take one message of the run."""
        super().on(message)
        if isinstance(message, RunEnded):
            for name in self._files:
                if (self._folder / name).exists():
                    self._client.log_artifact(self._id, str(self._folder / name))
            self._client.set_terminated(self._id, _STATUS[message.summary["status"]])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        """Nothing to do: every value is written when it is received."""


def _local_store(folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return f"sqlite:///{(folder / 'mlflow.db').absolute()}"


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested settings."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield _name(f"{prefix}{key}"), value


def _name(name: str) -> str:
    """A name with the characters that MLflow accepts: `test/P+S_loss` becomes `test/P_S_loss`."""
    return "".join(c if c.isalnum() or c in "_-. :/" else "_" for c in name)
