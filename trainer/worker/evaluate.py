"""The test set, touched once: the body that workers execute when all phases are done."""

import math
import sys
from collections.abc import Iterator, Mapping

import safetensors.torch

from trainer import artifact
from trainer.compress.rewrite import restore
from trainer.config import Config
from trainer.engine.evaluate import evaluate
from trainer.engine.world import World
from trainer.errors import RunError
from trainer.messages import Measured, Message, RunStopped
from trainer.parts import build_data, build_model, build_runtime
from trainer.worker.run import should_stop

DECODED = "artifact"  # the model whose weights are a compressed file


def measure(world: World, cfg: Config, models: Mapping[str, bytes]) -> Iterator[Message]:
    """Evaluate models on the test set. Each is built anew and shares nothing with a trained one.

    Args:
        models: by name, the content of a safetensors file; `DECODED` that of a compressed model.
    """
    world.heartbeat.begin("in the measurement", len(cfg.phases))
    with world.heartbeat.busy():
        test = build_data(cfg).test
    runtime = build_runtime(world, cfg)
    for name, content in models.items():
        if should_stop(world):
            yield RunStopped()
            return
        with world.heartbeat.busy():
            if name == DECODED:
                weights = artifact.loads(content, max_bytes=sys.maxsize)  # our own file
            else:
                weights = safetensors.torch.load(content)
            model = restore(build_model(cfg), weights)
        metrics = evaluate(runtime.place(model), test, runtime, "test")
        if not math.isfinite(metrics.loss):
            raise RunError(
                f"the test loss of the {name} model is {metrics.loss}, although the inputs are "
                "finite: look for a division or a logarithm of zero in the model"
            )
        entries = model.state_dict()
        parameters = tuple(key for key, _ in model.named_parameters() if key in entries)
        yield Measured(name, metrics.accuracy, metrics.loss, parameters)
