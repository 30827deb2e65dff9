"""The weights of an experiment: those that it starts with, and the compressed file of the last."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import artifact
from trainer.compress.state import model_state
from trainer.data.datasets import preserved_generators
from trainer.errors import ConfigError, RunError
from trainer.experiment.experiment import Experiment
from trainer.phases.structure import from_metadata, to_metadata
from trainer.store.initial import initial_weights as read_initial
from trainer.store.serialization import from_bytes, to_bytes


def initial_weights(
    experiment: Experiment,
    model: nn.Module | None,
    notify: Callable[[str], object] = lambda line: None,
) -> bytes:
    """The initial weights that were given, as the content of a safetensors file.

    Args:
        experiment: The experiment.
        model: The model, perhaps on the meta device; None: not known here.
        notify: Gets a line for everything that was not taken from the file as it is there.

    Raises:
        ConfigError: The file of `init_from` cannot be read, or is of another model.
    """
    if experiment.config.init_from is None:
        return to_bytes(model_state(experiment.build_model()))
    loaded = read_initial(
        Path(experiment.config.init_from).expanduser(),
        model or _described_model(experiment),
        partial(_fresh_model, experiment),
        skip=experiment.config.init_skip,
        strict=experiment.config.init_strict,
        coder=experiment.own_coder,
    )
    for line in loaded.notices:
        notify(line)
    return loaded.content


def _described_model(experiment: Experiment) -> nn.Module:
    """The model for its names and shapes: on the meta device if it can be built there."""
    try:
        with torch.device("meta"):
            return experiment.build_model()
    except ConfigError:
        return _fresh_model(experiment)


def _fresh_model(experiment: Experiment) -> nn.Module:
    """The model with the values that the seed draws, as on every worker."""
    with preserved_generators():
        torch.manual_seed(experiment.config.seed)
        return experiment.build_model()


def encode_artifact(
    experiment: Experiment, weights: bytes, about: Mapping[str, Any] | None = None
) -> bytes:
    """The compressed file of a model.

    Args:
        experiment: Of the model.
        weights: Content of a safetensors file.
        about: Plain values to store beside name, seed and model.

    Raises:
        RunError: A coder of the user's own fails.
    """
    tensors, metadata = from_bytes(weights)
    config = experiment.config
    about = {
        "name": config.name,
        "seed": config.seed,
        "model": config.model,
        **(about or {}),
        **to_metadata(from_metadata(metadata)),
    }
    try:
        return artifact.encode(
            dict(sorted(tensors.items())),
            config.artifact.dtype,
            experiment.coder,
            about,
            config.artifact.max_seconds,
        )
    except ValueError as error:
        raise RunError(f"model.dcz cannot be written: {error}") from error
