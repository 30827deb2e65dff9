"""The function that workers execute for a trial of a sweep."""

import time
from collections.abc import Collection, Iterator

import torch

from trainer.engine.world import World
from trainer.experiment import Experiment, encode_artifact
from trainer.inference import compile
from trainer.inference.measure import alternate, medians
from trainer.messages import FileEncoded, LatencyMeasured, Message, PhaseEnded
from trainer.phases.structure import from_metadata
from trainer.store.serialization import from_bytes
from trainer.worker.run import Start, run_phases

_SECONDS = 0.3  # duration of a latency measurement


def run_trial(
    world: World, experiment: Experiment, start: Start, measures: Collection[str]
) -> Iterator[Message]:
    """Execute the phases and, if asked for, measure the final model on rank 0.

    Encoding a large model takes seconds. On the workers it delays no other trial.

    Args:
        world: The ranks.
        experiment: The trial.
        start: Where it begins or continues.
        measures: Of "bytes" and "latency": whether to yield FileEncoded and LatencyMeasured, before
            the end of the last phase.
    """
    last = len(experiment.phases) - 1
    if start.phase > last and start.weights is not None:
        yield from _measure(world, experiment, start.weights, measures)
    for message in run_phases(world, experiment, start):
        if isinstance(message, PhaseEnded) and message.index == last:
            yield from _measure(world, experiment, message.weights, measures)
        yield message


def _measure(
    world: World, experiment: Experiment, weights: bytes, measures: Collection[str]
) -> Iterator[Message]:
    if world.rank != 0:
        return
    if "bytes" in measures:
        with world.heartbeat.busy():
            size = len(encode_artifact(experiment, weights))
        yield FileEncoded(size)
    if "latency" in measures:
        with world.heartbeat.busy():
            microseconds = 1e6 * _latency(experiment, weights)
        yield LatencyMeasured(microseconds)


def _latency(experiment: Experiment, content: bytes) -> float:
    """Seconds of CPU time for one validation sample on one thread: other trials run meanwhile."""
    weights, metadata = from_bytes(content)
    ((sample, _),) = experiment.build_data().validation.batches([torch.arange(1)], None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            model = experiment.load_model(weights, from_metadata(metadata))
            model = compile(model, threads=1)
            calls = {"": lambda: experiment.task.call(model, sample)}
            return medians(alternate(calls, _SECONDS, clock=time.thread_time))[""]
    finally:
        torch.set_num_threads(threads)
