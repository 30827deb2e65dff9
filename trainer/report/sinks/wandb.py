"""Curves in Weights & Biases. Needs the extra `wandb`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import ConfigError, first_line
from trainer.messages import Message, RunEnded
from trainer.metrics import metric_names
from trainer.report.sinks.base import ScalarSink
from trainer.report.sinks.identity import run_id


class WandbSink(ScalarSink):
    """Records a run in Weights & Biases. A resumed run continues under the same id.

    In mode "offline" nothing leaves the machine: `wandb sync RUN_DIR/wandb/offline-run-*` uploads
    the run later.

    Args:
        folder: The run directory.
        name: Title of the run.
        settings: All settings of the run.
        group: Name of the sweep that the run is a trial of.
        project: Project that the run appears in.
        entity: User or team; None: your default.
        mode: "online", "offline", "disabled"; None: the value of the environment variable
            WANDB_MODE, or else online.
        tags: Tags of the run.

    Raises:
        ConfigError: wandb is not installed, or the service cannot be reached.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        settings: Mapping[str, Any],
        group: str | None = None,
        project: str = "trainer",
        entity: str | None = None,
        mode: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        super().__init__()
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no reports of crashes either
        try:
            import wandb
        except ImportError as error:
            raise ConfigError(
                "logger=wandb: wandb is not installed; run pip install '.[wandb]' in the checkout"
            ) from error
        try:
            self._run = wandb.init(
                dir=folder,
                id=run_id(folder),
                resume="allow",
                reinit="create_new",  # trials of a sweep run side by side
                name=name,
                group=group,
                project=project,
                entity=entity,
                mode=mode,  # type: ignore[arg-type]
                tags=tags,
                config=dict(settings),
                settings=wandb.Settings(
                    silent=True, console="off", x_transaction_log_flush_interval=5.0
                ),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"{first_line(error).rstrip('.')}; without an account or network set "
                "logger.wandb.mode=offline"
            ) from error

    def on(self, message: Message) -> None:
        """Take one message of the run."""
        super().on(message)
        if isinstance(message, RunEnded):
            for key in ("status", *metric_names(message.summary), "loss"):
                self._run.summary[key] = message.summary.get(key)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()
