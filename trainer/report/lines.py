"""One line of text about each message of a run, for the terminal and for log.txt."""

from collections.abc import Mapping

from trainer.messages import (
    EpochEnded,
    HeadLost,
    HeadRecovered,
    MembersChanged,
    Message,
    Notice,
    PhaseEnded,
    PhaseStarted,
    Resumed,
    RoundEnded,
    RunStarted,
    WorkersLost,
)
from trainer.metrics import format_metric
from trainer.report.text import plural


def describe(message: Message) -> str | None:
    """One line about a message, for the log; None for messages that only report progress."""
    match message:
        case Notice():
            return message.text
        case WorkersLost(elastic=True):
            count = "" if message.counted else "; its host has left the cluster"
            return f"{message.reason}{count}; the other workers continue"
        case MembersChanged():
            after = f"after step {message.step:,} of" if message.step else "at the start of"
            return (
                f"{_count(message.workers, 'worker')} {after} phase {message.phase + 1}, ready in "
                f"{message.seconds:.1f} s: {message.reason}"
            )
        case WorkersLost(counted=False):
            return f"{message.reason}; its host is lost; restarting from the last checkpoint"
        case WorkersLost():
            return (
                f"{message.reason}; restarting from the last checkpoint (restart {message.restart})"
            )
        case HeadLost():
            return (
                f"the head node of the Ray cluster at {message.address} does not answer; training "
                "continues and stops with a checkpoint if the head stays lost"
            )
        case HeadRecovered():
            return f"the head node at {message.address} answers again"
        case Resumed() if not message.is_beginning:
            if message.phase == len(message.names):
                return "resuming after the last phase"
            name = message.names[message.phase]
            after = f"after step {message.step:,} of" if message.step else "with"
            return f"resuming {after} {name}"
        case RunStarted():
            return (
                f"{_count(message.workers, 'worker')} on {message.device}; "
                f"{message.parameters:,} parameters; samples: {message.train:,} training, "
                f"{message.validation:,} validation, {message.test:,} test"
            )
        case PhaseStarted():
            kind = "" if message.kind == message.name else f" ({message.kind})"
            training = "no training"
            if message.steps:
                epochs, steps = _count(message.epochs, "epoch"), _count(message.steps, "step")
                training = f"{epochs}, {steps}, {message.learnable:,} trainable values"
            return f"{message.name}{kind}: {training}"
        case EpochEnded():
            parts = [
                f"{message.phase} epoch {message.epoch}: loss {message.train_loss:.4f} "
                f"(validation {message.loss:.4f})",
                *(f"{name} {format_metric(name, of)}" for name, of in message.metrics.items()),
                *([f"sparsity {message.sparsity:.1%}"] if message.sparsity else []),
                f"{message.images_per_second:,.0f} samples/s",
                *([f"{_count(message.skipped, 'step')} skipped"] if message.skipped else []),
            ]
            return ", ".join(parts)
        case RoundEnded():
            record = message.record
            otherwise = "extended" if record.extended else "reverted to the last accepted weights"
            return (
                f"{message.phase} round {record.round}: sparsity {record.sparsity:.2%}, "
                f"{_first(record.metrics, record.loss)}: "
                + ("accepted" if record.accepted else f"beyond the limit, {otherwise}")
                + (f"; last round: {record.stopped}" if record.stopped else "")
            )
        case PhaseEnded():
            done = message.record
            kept = f"{done.nonzero:,} of {done.parameters:,} parameters are nonzero"
            if done.nonzero == done.parameters:
                kept = f"{done.parameters:,} parameters"
            first = _first(done.metrics, done.loss)
            return f"{done.name} done in {done.seconds:.1f} s: {first}, {kept}"
    return None


def phase_title(message: PhaseStarted, phases: int) -> str:
    """The name of a phase and its place among the phases of the run.

    Args:
        phases: number of phases; 0: not known.
    """
    if phases > 1:
        return f"phase {message.index + 1} of {phases}: {message.name}"
    return message.name


def _first(metrics: Mapping[str, float], loss: float) -> str:
    """Name and value of the first metric; of the loss, if there is none."""
    name, value = next(iter(metrics.items()), ("loss", loss))
    return f"{name} {format_metric(name, value)}"


def _count(count: int, noun: str) -> str:
    return f"{count:,} {plural(noun, count)}"
