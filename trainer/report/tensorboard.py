"""Learning curves for TensorBoard: events in RUN_DIR/tensorboard, steps counted over all phases."""

import threading
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from trainer.messages import EpochEnded, Measured, Message, PhaseEnded, Progress


class Curves:
    """Writes the messages of a run as scalars. `go_on` comes first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hook, threading.excepthook = threading.excepthook, self._in_thread
        self._writer: SummaryWriter | None = None
        self._before = 0  # steps of the phases that ended

    def on(self, message: Message) -> None:
        """Write what the message says, at its step of the run."""
        match message:
            case Progress():
                self._add(message.step, {"train/loss": message.loss, "train/lr": message.lr})
            case EpochEnded():
                self._add(
                    message.step,
                    {
                        "epoch/train_loss": message.train_loss,
                        "epoch/validation_loss": message.loss,
                        "epoch/validation_accuracy": message.accuracy,
                        "epoch/sparsity": message.sparsity,
                        "epoch/samples_per_second": message.images_per_second,
                    },
                )
            case PhaseEnded():
                self._before += message.record.steps
            case Measured():
                name = f"test/{message.name}"
                self._add(0, {f"{name}_accuracy": message.accuracy, f"{name}_loss": message.loss})

    def go_on(self, before: int, step: int) -> None:
        """Go on from `step` of the phase after `before` steps; hide what was written later.

        Step 0 of the first phase is the beginning.
        """
        if self._writer:
            self._writer.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=before + step + 1)
        self._before = before

    def close(self) -> None:
        """Write what is still in memory."""
        try:
            if self._writer:
                self._writer.close()
        finally:
            threading.excepthook = self._hook

    def _in_thread(self, args: threading.ExceptHookArgs) -> None:
        """The writer's thread ends on a full disk; the next `on` or `close` raises its error."""
        if not issubclass(args.exc_type, OSError):
            self._hook(args)

    def _add(self, step: int, values: dict[str, float]) -> None:
        assert self._writer is not None
        for name, value in values.items():
            self._writer.add_scalar(name, value, self._before + step)
