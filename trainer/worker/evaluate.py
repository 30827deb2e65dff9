"""Evaluation on the test set, once, when all phases are done."""

import math
import sys
from collections.abc import Iterator, Mapping

from trainer import artifact
from trainer.engine.evaluate import evaluate
from trainer.engine.world import World
from trainer.errors import RunError
from trainer.experiment import Experiment
from trainer.messages import Evaluated, Message, RunStopped
from trainer.phases.structure import from_metadata
from trainer.store.serialization import from_bytes
from trainer.worker.phase import STOP
from trainer.worker.preflight import check_split
from trainer.worker.run import request_of_all

DECODED = "artifact"
"""Name of the model whose weights are decoded from the compressed file."""


def evaluate_models(
    world: World, experiment: Experiment, models: Mapping[str, bytes]
) -> Iterator[Message]:
    """Evaluate models on the test set. Each is built anew, apart from the models in memory.

    Args:
        models: By name, the content of a safetensors file; `DECODED`: of a compressed model.
    """
    world.heartbeat.begin("in the evaluation on the test set", len(experiment.phases))
    with world.heartbeat.busy():
        test = experiment.build_data().test
    runtime = experiment.build_runtime(world)
    for name, content in models.items():
        if request_of_all(world) == STOP:  # members change during training only
            yield RunStopped()
            return
        with world.heartbeat.busy():
            if name == DECODED:  # written by this run, so its size needs no limit
                weights = artifact.loads(content, sys.maxsize, experiment.own_coder)
                metadata = artifact.read_about(content)
            else:
                weights, metadata = from_bytes(content)
            model = experiment.load_model(weights, from_metadata(metadata))
        checked = check_split("test", test, runtime.place(model), runtime)
        metrics = evaluate(model, checked, runtime, "test")
        if not math.isfinite(metrics.loss):
            raise RunError(
                f"the test loss of the {name} model is {metrics.loss}, although the inputs are "
                "finite: look for a division or a logarithm of zero in the model"
            )
        entries = model.state_dict()
        parameters = tuple(key for key, _ in model.named_parameters() if key in entries)
        yield Evaluated(name, metrics.values, metrics.loss, parameters)
