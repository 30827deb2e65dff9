"""Initial weights from a file that the user names: init_from=FILE.

Every entry must have the name and the shape that it has in the model. Its type may differ from the
model's under these rules:

- The kind of numbers must be the same: floating-point, complex, integer or bool. Integers in the
  place of floating-point weights are quantized weights whose scales are elsewhere, and complex
  numbers would lose their imaginary parts.
- Within a kind, values are converted: float16 and bfloat16 weights become float32 exactly, float64
  weights are rounded. A finite value that the model's type cannot represent is refused.
- Parameters must be finite: training cannot start from NaN.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.compress.coding import Coder
from trainer.compress.quantize import is_quantizer_entry
from trainer.compress.state import is_packed, kind_of, model_state, pack_state, type_name
from trainer.errors import ConfigError, first_line
from trainer.store.serialization import to_bytes

_NESTED = ("state_dict", "model_state_dict", "model")  # where training scripts put the weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state_dict in a file. Nothing is unpickled but tensors and plain values.

    Args:
        path: .safetensors; .dcz, a compressed model; or what torch.save wrote: a state_dict, or a
            mapping that holds one under "state_dict", "model_state_dict" or "model".

    Raises:
        ConfigError: there is no such file, or it holds no state_dict.
    """
    return _read(path, None)[0]


def initial_weights(path: Path, model: nn.Module | None, coder: Coder | None = None) -> bytes:
    """Read the state_dict in a file and return it as the content of a safetensors file.

    Args:
        path: as in `read_weights`.
        model: the model, perhaps on the meta device, that the weights must fit; None: not known
            here, and only what can be checked without it is checked.
        coder: as for `trainer.artifact.load`.

    Raises:
        ConfigError: as `read_weights`, or the weights are quantized, or do not fit the model by the
            rules above.
    """
    weights, versions = _read(path, coder)
    known = {} if model is None else model_state(model)
    if any(name not in known for name in weights if is_quantizer_entry(name)):
        raise ConfigError(
            f"init_from={path}: the model in it is quantized, and no phase can follow that; start "
            "from the weights before the quantize phase (in checkpoints/ of its run)"
        )
    if model is not None:
        _check_versions(versions, model, path)
        parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for name in [*known, *weights]:
            if is_packed(name) and name in known and name in weights:
                continue  # its module checks it
            problem = _problem(weights.get(name), known.get(name), name in parameters)
            if problem:
                raise ConfigError(f"init_from={path}: {name} {problem}")
    return to_bytes(weights)


def _read(path: Path, coder: Coder | None) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """The state_dict in a file, and the version numbers of its modules, where it holds them."""
    try:
        match path.suffix:
            case ".safetensors":
                return safetensors.torch.load_file(path), {}
            case ".dcz":
                return artifact.load(path, coder=coder), {}
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own
        raise ConfigError(f"init_from={path}: it cannot be read: {first_line(error)}") from error
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    try:
        if isinstance(loaded, Mapping):
            weights = pack_state({str(name): value for name, value in loaded.items()})
            return weights, getattr(loaded, "_metadata", {})
    except ConfigError:
        pass
    raise ConfigError(
        f"init_from={path}: a state_dict is needed, a mapping from names to dense tensors; save it "
        "with torch.save(model.state_dict(), FILE)"
    )


def _check_versions(versions: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    """Refuse a state_dict that another version of a module's class wrote."""
    wanted: Mapping[str, Any] = model.state_dict()._metadata  # type: ignore[attr-defined]
    for name, entry in versions.items():
        old, new = entry.get("version"), wanted.get(name, {}).get("version")
        if old is not None and new is not None and old != new:
            raise ConfigError(
                f"init_from={path}: {name or 'the model'} was saved by version {old} of its class, "
                f"and this is version {new}: load the file with load_state_dict and save it again"
            )


def _problem(found: Tensor | None, wanted: Tensor | None, trained: bool) -> str:
    """What is wrong with an entry of the file; empty where it fits.

    Args:
        found: the entry in the file.
        wanted: the entry of the model.
        trained: whether it is a parameter.
    """
    if found is None or wanted is None or found.shape != wanted.shape:
        return f"is {_shape(found)} in the file and {_shape(wanted)} in the model"
    types = f"{type_name(found)} in the file and {type_name(wanted)} in the model"
    if kind_of(found) != kind_of(wanted):
        return f"is {types}: only numbers of the same kind are converted"
    if found.dtype != wanted.dtype:
        converted = found.to(wanted.dtype)
        if kind_of(found) == "integer":
            exact = torch.equal(converted.to(found.dtype), found)
        else:
            exact = torch.equal(_widened(converted).isfinite(), _widened(found).isfinite())
        if not exact:
            return f"is {types}, which cannot represent all of its values"
    if trained and not bool(_widened(found).isfinite().all()):
        return "holds NaN or Inf: training cannot start from that"
    return ""


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"of shape {[*tensor.shape]}"


def _widened(tensor: Tensor) -> Tensor:
    """Values of 8 bits as float32, since torch cannot ask all of those types for Inf."""
    return tensor.float() if tensor.element_size() == 1 else tensor
