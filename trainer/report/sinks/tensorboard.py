"""Learning curves for TensorBoard, in the folder tensorboard/ of the run."""

import threading
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard import SummaryWriter

from trainer.report.sinks.base import ScalarSink


class TensorBoardSink(ScalarSink):
    """Writes curves as TensorBoard events.

    Args:
        folder: The run directory.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder / "tensorboard"
        self._hook, threading.excepthook = threading.excepthook, self._on_thread_error
        self._writer: SummaryWriter | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert self._writer is not None  # Resumed comes first
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def rewind(self, step: int) -> None:
        # TensorBoard hides values of this and later steps that were recorded before.
        if self._writer is None:
            self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)
        else:  # names of two files of one second may be in the wrong order
            begins = SessionLog(status=SessionLog.START)
            self._writer._get_file_writer().add_event(Event(step=step + 1, session_log=begins))

    def close(self) -> None:
        try:
            if self._writer:
                self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """Silence the writer's thread on a full disk: the next `on` or `close` raises its error."""
        if not issubclass(args.exc_type, OSError):
            self._hook(args)
