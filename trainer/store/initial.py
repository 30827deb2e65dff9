"""Weights to begin with, from a file of the user's: init_from=FILE."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.compress.quantize import is_quantizer_entry
from trainer.errors import ConfigError, first_line
from trainer.store.serialization import to_bytes

_NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file; nothing is unpickled but tensors.

    Args:
        path: .safetensors; .dcz, a compressed model; or else what torch.save wrote: a state_dict,
            or a mapping that holds one.

    Raises:
        ConfigError: there is no such file, or it holds no weights.
    """
    try:
        match path.suffix:
            case ".safetensors":
                return safetensors.torch.load_file(path)
            case ".dcz":
                return artifact.load(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own
        raise ConfigError(f"init_from={path}: it cannot be read: {first_line(error)}") from error
    return _state_dict(loaded, path)


def initial_weights(path: Path, model: nn.Module | None) -> bytes:
    """The same as the content of a safetensors file.

    Args:
        model: holds names and shapes that must fit; None: not known here.

    Raises:
        ConfigError: as `read_weights`, or the weights are quantized, or not those of the model.
    """
    weights = read_weights(path)
    known = {} if model is None else model.state_dict()
    if any(name not in known for name in weights if is_quantizer_entry(name)):
        raise ConfigError(
            f"init_from={path}: the model in it is quantized, and nothing can follow that; begin "
            "with the weights before the quantize phase (in checkpoints/ of its run)"
        )
    if model is not None:
        _compare({name: tuple(t.shape) for name, t in weights.items()}, model, path)
    return to_bytes(weights)


def _state_dict(loaded: Any, path: Path) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise ConfigError(
            f"init_from={path}: a state_dict is needed, names with tensors; save it with "
            "torch.save(model.state_dict(), FILE)"
        )
    return {str(name): tensor for name, tensor in loaded.items()}


def _compare(shapes: Mapping[str, tuple[int, ...]], model: nn.Module, path: Path) -> None:
    wanted = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for name in [*wanted, *shapes]:
        if shapes.get(name) != wanted.get(name):
            raise ConfigError(
                f"init_from={path}: {name} is {_told(shapes.get(name))} in the file and "
                f"{_told(wanted.get(name))} in the model"
            )


def _told(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else f"of shape {list(shape)}"
