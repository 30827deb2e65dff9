"""The function that workers execute for a trial of a sweep."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from trainer.engine.world import World
from trainer.errors import ConfigError, RunError
from trainer.experiment import Experiment, encode_artifact
from trainer.inference import compile
from trainer.inference.measure import alternate, medians
from trainer.messages import Message, PhaseEnded, TrialMeasured
from trainer.phases.structure import from_metadata
from trainer.store.serialization import from_bytes
from trainer.worker.run import Start, run_phases

MODELLED = ("energy", "tpu_cycles", "eie_cycles")
"""Measures that follow from models of hardware: see trainer.hardware.costs.modelled_costs."""

_SECONDS = 0.3  # duration of a latency measurement
_SAMPLES = 32  # of which densities of activations are averages


def run_trial(
    world: World, experiment: Experiment, start: Start, measures: Collection[str]
) -> Iterator[Message]:
    """Execute the phases and, if asked for, measure the final model on rank 0.

    Encoding a large model takes seconds. On the workers it delays no other trial.

    Args:
        world: The ranks.
        experiment: The trial.
        start: Where it begins or continues.
        measures: What to yield as TrialMeasured before the end of the last phase: `bytes` of
            model.dcz; `latency`, the microseconds of CPU time that the engine for compressed
            weights takes for one sample on one thread; and those of MODELLED.

    Raises:
        RunError: The model cannot be measured so.
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
        yield TrialMeasured("bytes", size)
    if "latency" in measures:
        with world.heartbeat.busy():
            microseconds = 1e6 * _latency(experiment, weights)
        yield TrialMeasured("latency", microseconds)
    if wanted := [name for name in MODELLED if name in measures]:
        with world.heartbeat.busy():
            costs = _modelled(wanted, experiment, weights)
        for name in wanted:
            yield TrialMeasured(name, costs[name])


def _modelled(names: Sequence[str], experiment: Experiment, content: bytes) -> Mapping[str, float]:
    """Costs of a validation sample that follow from models of hardware."""
    from trainer.hardware.costs import modelled_costs  # slow to import

    weights, metadata = from_bytes(content)
    validation = experiment.build_data().validation
    ((samples, _),) = validation.batches([torch.arange(min(_SAMPLES, len(validation)))], None)
    if not isinstance(samples, torch.Tensor):
        raise RunError(f"{names[0]}: it can be computed for a model with one input only")
    model = experiment.load_model(weights, from_metadata(metadata))
    try:
        return modelled_costs(names, model, samples)
    except ConfigError as error:
        raise RunError(f"the trial cannot be measured: {error}") from error


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
