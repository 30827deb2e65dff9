"""The function that workers execute for a trial of a sweep."""

from collections.abc import Iterator

from trainer.engine.world import World
from trainer.experiment import Experiment
from trainer.messages import FileEncoded, Message, PhaseEnded
from trainer.worker.run import Start, run_phases


def run_trial(
    world: World, experiment: Experiment, start: Start, encode: bool
) -> Iterator[Message]:
    """Execute the phases and, if asked for, encode the final model on rank 0.

    Encoding a large model takes seconds. On the workers it delays no other trial.

    Args:
        world: The ranks.
        experiment: The trial.
        start: Where it begins or continues.
        encode: Whether to yield FileEncoded, before the end of the last phase.
    """
    last = len(experiment.phases) - 1
    if encode and start.phase > last and start.weights is not None:
        yield from _encode(world, experiment, start.weights)
    for message in run_phases(world, experiment, start):
        if encode and isinstance(message, PhaseEnded) and message.index == last:
            yield from _encode(world, experiment, message.weights)
        yield message


def _encode(world: World, experiment: Experiment, weights: bytes) -> Iterator[Message]:
    if world.rank == 0:
        with world.heartbeat.busy():
            size = len(experiment.encode_artifact(weights))
        yield FileEncoded(size)
