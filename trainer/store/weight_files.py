"""Files that hold a state_dict: safetensors, PyTorch checkpoints, and model.dcz."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from trainer import artifact
from trainer.compress.coding import Coder
from trainer.compress.state import pack_state
from trainer.errors import ConfigError, first_line

_NESTED = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")
"""Keys under which training scripts store the weights, in the order of the search."""

_IN_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Names of weight files that save_pretrained (transformers, timm) and runs of trainer write."""

_NEEDED = (
    "a state_dict is needed, a mapping from names to dense tensors; save it with "
    "torch.save(model.state_dict(), FILE)"
)


def read_weights(
    path: Path, coder: Coder | None = None
) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Read a state_dict. Nothing is unpickled but tensors and plain values.

    Args:
        path: .safetensors; .dcz, a compressed model; what torch.save wrote: a state_dict, or a
            mapping that holds one, such as a training checkpoint; an index of several such files
            (.index.json); or a folder with one of these, such as save_pretrained writes.
        coder: As for `trainer.artifact.load`.

    Returns:
        The state_dict, and the metadata of its modules, such as versions, by the module's name;
        empty where the file has none.

    Raises:
        ConfigError: There is no such file, or it holds no state_dict, or several.
    """
    if os.path.isdir(path):
        found = [path / name for name in _IN_FOLDER if (path / name).is_file()]
        if not found:
            raise ConfigError(
                f"init_from={path}: the folder holds none of {', '.join(_IN_FOLDER)}; name a file"
            )
        return read_weights(found[0], coder)
    if path.name.endswith(".index.json"):
        return _read_shards(path), {}
    try:
        match path.suffix:
            case ".safetensors":
                return safetensors.torch.load_file(path), {}
            case ".dcz":
                return artifact.load(path, coder=coder), {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader raises errors of its own
        reason = first_line(error)
        if "weights_only" in str(error):
            reason = f"it holds other objects than tensors and plain values; {_NEEDED}"
        raise ConfigError(f"init_from={path}: it cannot be read: {reason}") from error
    state = _find_state(loaded, path)
    try:
        weights = pack_state({str(name): value for name, value in state.items()})
    except ConfigError as error:
        raise ConfigError(f"init_from={path}: {_NEEDED}") from error
    return weights, getattr(state, "_metadata", {})


def _read_shards(path: Path) -> dict[str, Tensor]:
    try:
        files = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"init_from={path}: it is not an index of weight files") from error
    weights: dict[str, Tensor] = {}
    for name in files:
        weights |= read_weights(path.parent / Path(name).name)[0]
    return weights


def _find_state(loaded: Any, path: Path) -> Mapping[str, Any]:
    """The state_dict in an object that torch.load returned."""
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            return _find_state(loaded[key], path)
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConfigError(f"init_from={path}: {_NEEDED}")
    if any(isinstance(value, Tensor) for value in loaded.values()):
        return loaded
    nested = [key for key, value in loaded.items() if _holds_tensors(value)]
    if len(nested) == 1:
        return _find_state(loaded[nested[0]], path)
    problem = f"; it holds several: {', '.join(map(str, nested))}" if nested else ""
    raise ConfigError(f"init_from={path}: {_NEEDED}{problem}")


def _holds_tensors(value: object) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())
