"""Initial weights from a file that the user names: init_from=FILE.

Names of the file are adapted to those of the model if wrappers changed them
(DistributedDataParallel, torch.compile, a module that has the model as an attribute). After that
every entry must have the name and the shape that it has in the model, with these exceptions:

- Entries that `skip` names are not loaded.
- A weight that is tied to one in the file needs no entry: save_pretrained writes it once.
- Buffers that a model computes by itself (positions, masks) may be missing or extra, since
  libraries add and drop them between versions. The running statistics of batch norm may not.
- Without `strict`, missing, extra and differently shaped entries are left out.

Entries that are not in the file keep the fresh values of the model, drawn by the seed.

The type of an entry may differ from the model's under these rules:

- The kind of numbers must be the same: floating-point, complex, integer or bool. Integers in the
  place of floating-point weights are quantized weights whose scales are elsewhere, and complex
  numbers would lose their imaginary parts.
- Within a kind, values are converted: float16 and bfloat16 weights become float32 exactly, float64
  weights are rounded. A finite value that the model's type cannot represent is refused.
- Parameters must be finite: training cannot start from NaN.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from trainer.compress.coding import Coder
from trainer.compress.quantize import is_quantizer_entry
from trainer.compress.select import matches
from trainer.compress.state import is_packed, kind_of, model_state, type_name
from trainer.errors import ConfigError
from trainer.store.names import adapt_names
from trainer.store.serialization import to_bytes
from trainer.store.weight_files import read_weights

_RUNNING = ("running_mean", "running_var")
_COMPUTED = (  # floating-point buffers that libraries compute and once stored
    "inv_freq",
    "masked_bias",
    "attn_mask",
    "relative_coords_table",
    "total_ops",
    "total_params",
)
_LISTED = 6  # names listed in a message


@dataclass
class Loaded:
    """Initial weights.

    Attributes:
        content: A complete state_dict, as the content of a safetensors file.
        notices: Lines for the user: entries that were left out, and names that were changed.
    """

    content: bytes
    notices: list[str] = field(default_factory=list)


def initial_weights(
    path: Path,
    model: nn.Module,
    fresh: Callable[[], nn.Module],
    *,
    skip: Sequence[str] = (),
    strict: bool = True,
    coder: Coder | None = None,
) -> Loaded:
    """Read weights for a model from a file, by the rules above.

    Args:
        path: As in `read_weights`.
        model: The model, perhaps on the meta device.
        fresh: Builds the model with its values; called only if some are not in the file.
        skip: Patterns of names in the model, or of its modules, that are not loaded.
        strict: Whether missing, extra and differently shaped entries are errors.
        coder: As for `trainer.artifact.load`.

    Raises:
        ConfigError: As `read_weights`; or the weights are quantized, or do not fit the model.
    """
    found, versions = read_weights(path, coder)
    wanted = model_state(model)
    if any(name not in wanted for name in found if is_quantizer_entry(name)):
        raise ConfigError(
            f"init_from={path}: the model in it is quantized, so no phase can follow; start "
            "from the weights before the quantize phase (in checkpoints/ of its run)"
        )
    try:
        renamed, change = adapt_names(found, wanted)
    except ConfigError as error:
        raise ConfigError(f"init_from={path}: {error}") from error
    found = {renamed[name]: value for name, value in found.items()}
    for pattern in skip:
        if not any(matches(pattern, name) for name in (*wanted, *found)):
            raise ConfigError(
                f"init_skip: {pattern!r} matches no entry; there are {_listed([*wanted])}"
            )
    skipped = {name for name in (*wanted, *found) if any(matches(p, name) for p in skip)}
    if not change:
        _check_versions(versions, model, path)

    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    ties = _ties(model)
    chosen: dict[str, Tensor] = {}
    problems: list[str] = []
    for name, target in wanted.items():
        if name in skipped:
            continue
        value = found.get(name)
        if value is None:
            value = next((found[tied] for tied in ties.get(name, ()) if tied in found), None)
        if value is None and name not in parameters and not name.endswith(_RUNNING):
            continue
        if value is None or (value.shape != target.shape and not is_packed(name)):
            problems.append(
                f"{name} is {_shape(value)} in the file and {_shape(target)} in the model"
            )
            continue
        if problem := "" if is_packed(name) else _problem(value, target, name in parameters):
            raise ConfigError(f"init_from={path}: {name} {problem}")
        chosen[name] = value
    unused = [name for name in found if name not in wanted]
    problems += [
        f"{name} is {_shape(found[name])} in the file and missing in the model"
        for name in unused
        if name not in skipped and not _is_computed(name, found[name])
    ]
    if problems and strict:
        more = f" (and {len(problems) - 3} more entries differ)" if len(problems) > 3 else ""
        raise ConfigError(
            f"init_from={path}: {'; '.join(problems[:3])}{more}. To leave entries out, name "
            "them in init_skip, such as init_skip=[head.*], or set init_strict=false"
        )
    if not chosen.keys() & parameters:
        raise ConfigError(
            f"init_from={path}: no weight of the file fits the model: it has "
            f"{_listed([*found])}, and the model {_listed([*wanted])}"
        )
    _check_ties(chosen, ties, path)
    missing = [name for name in wanted if name not in chosen]
    notices = [f"the names in the file were adapted: {change}"] if change else []
    if missing:
        values = model_state(fresh())
        chosen = {name: chosen[name] if name in chosen else values[name] for name in wanted}
        notices.append(f"not taken from the file, fresh values instead: {_listed(missing)}")
    if unused:
        notices.append(f"in the file, but not used: {_listed(unused)}")
    return Loaded(to_bytes(chosen), [f"init_from={path}: {line}" for line in notices])


def _ties(model: nn.Module) -> dict[str, list[str]]:
    """The other names of every tensor of the state_dict that has several."""
    names: dict[int, list[str]] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor):
            names.setdefault(id(value), []).append(name)
    groups = [group for group in names.values() if len(group) > 1]
    return {name: [n for n in group if n != name] for group in groups for name in group}


def _check_ties(chosen: Mapping[str, Tensor], ties: Mapping[str, list[str]], path: Path) -> None:
    for name, others in ties.items():
        for other in others:
            if name in chosen and other in chosen and not torch.equal(chosen[name], chosen[other]):
                raise ConfigError(
                    f"init_from={path}: {name} and {other} are one tensor in the model, but differ "
                    "in the file"
                )


def _is_computed(name: str, value: Tensor) -> bool:
    """Whether an entry that the model does not have is a buffer that training never changes."""
    return kind_of(value) in ("integer", "bool") or name.rpartition(".")[2] in _COMPUTED


def _check_versions(versions: Mapping[str, Any], model: nn.Module, path: Path) -> None:
    """Refuse a state_dict that another version of a module's class wrote.

    Batch norm's version 2 only added num_batches_tracked, which may be missing.
    """
    wanted: Mapping[str, Any] = model.state_dict()._metadata  # type: ignore[attr-defined]
    modules = dict(model.named_modules())
    for name, entry in versions.items():
        old, new = entry.get("version"), wanted.get(name, {}).get("version")
        if old is None or new is None or isinstance(modules.get(name), _NormBase):
            continue
        if old != new:
            raise ConfigError(
                f"init_from={path}: {name or 'the model'} was saved by version {old} of its class, "
                f"and this is version {new}: load the file with load_state_dict and save it again"
            )


def _problem(found: Tensor, wanted: Tensor, trained: bool) -> str:
    """Why the values of an entry of the file do not fit; empty if they do.

    Args:
        found: The entry in the file.
        wanted: The entry of the model, of the same shape.
        trained: Whether it is a parameter.
    """
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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"of shape {[*tensor.shape]}"


def _widened(tensor: Tensor) -> Tensor:
    """Values of 8 bits as float32, since `isinf` does not accept all of those types."""
    return tensor.float() if tensor.element_size() == 1 else tensor
