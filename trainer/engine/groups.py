"""Groups of parameters, named by patterns, that have optimizer settings of their own.

Names are logical, so that a group applies in every phase: to the weight itself, to its survivors
after pruning, and to its codebook after sharing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from trainer.compress.select import matches, no_match, trainable_parameters, weights
from trainer.config import check_choice, check_min
from trainer.config.instantiate import check_arguments
from trainer.errors import ConfigError

LR_FACTOR = "lr_factor"
"""Key of the factor on the learning rate in the parameter groups of an optimizer."""

_ALL = ("*",)


@dataclass(frozen=True)
class ParameterGroup:
    """Which parameters have other settings than the rest, and which settings."""

    name: str
    params: Sequence[str] = _ALL  # patterns of parameters or modules, as in fit.freeze
    kind: str = "all"  # of these: all | weights | vectors (biases, norms, scales)
    lr_factor: float | None = None  # of the learning rate; None: as without the group
    options: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the optimizer


def parse_groups(settings: Any, kind: type[torch.optim.Optimizer]) -> list[ParameterGroup]:
    """Parse and check the setting `optimizer.groups`.

    Args:
        settings: By the name of the group: `params` (a pattern or a list), `kind` and `lr_factor`,
            as in `ParameterGroup`; and keyword arguments of the optimizer.
        kind: Class of the optimizer.

    Raises:
        ConfigError: A setting is unknown or not allowed. Values of the optimizer's own settings are
            not checked.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"optimizer.groups={settings}: it must be a mapping, name -> settings")
    return [_parse_group(str(name), chosen, kind) for name, chosen in settings.items()]


def _parse_group(name: str, settings: Any, kind: type[torch.optim.Optimizer]) -> ParameterGroup:
    key = f"optimizer.groups.{name}"
    if not isinstance(settings, Mapping):
        raise ConfigError(f"{key}={settings}: it must be a mapping, such as {{weight_decay: 0}}")
    options = dict(settings)
    params, which = options.pop("params", _ALL), options.pop("kind", "all")
    factor = options.pop(LR_FACTOR, None)
    params = [params] if isinstance(params, str) else params
    if not (isinstance(params, Sequence) and all(isinstance(p, str) for p in params) and params):
        raise ConfigError(f"{key}.params={params}: it must be a pattern, or a list of patterns")
    check_choice(f"{key}.kind", which, ("all", "weights", "vectors"))
    if not isinstance(factor, int | float | None):
        raise ConfigError(f"{key}.{LR_FACTOR}={factor!r}: it must be a number")
    check_min(f"{key}.{LR_FACTOR}", factor, 0)
    if "lr" in options:
        raise ConfigError(
            f"{key}.lr={options['lr']}: the learning rate of a group is that of the phase times "
            f"{LR_FACTOR}; set {LR_FACTOR}"
        )
    check_arguments(key, kind, options)
    if not options and factor is None:
        raise ConfigError(f"{key}: it changes nothing; give it {LR_FACTOR}, or weight_decay")
    return ParameterGroup(name, tuple(params), which, factor, options)


def grouped(
    model: nn.Module, parameters: Sequence[nn.Parameter], groups: Sequence[ParameterGroup]
) -> list[dict[str, Any]]:
    """The argument of an optimizer: parameters of equal settings together, in their order.

    Args:
        model: As the optimizer will see it; its parameters may be those of compressed weights.
        parameters: Of the model; those that will be trained.
        groups: Where several match a parameter, the last one that has a setting decides on it. A
            pattern that matches nothing is ignored here.

    Returns:
        For each group of torch: `params` and what differs. Empty if there are no groups.
    """
    if not groups:
        return []
    own = _settings(model, groups)
    found: list[dict[str, Any]] = []
    for parameter in parameters:
        settings = own.get(id(parameter), {})
        for group in found:
            if {key: value for key, value in group.items() if key != "params"} == settings:
                group["params"].append(parameter)
                break
        else:
            found.append({"params": [parameter], **settings})
    return found


def check_groups(model: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Raise ConfigError for a pattern that matches no trainable parameter.

    Args:
        model: With its initial weights; it may be on the meta device.
        groups: Of the optimizer.
    """
    for group in groups:
        names = list(_of_kind(model, group.kind))
        what = {"all": "trainable parameter", "weights": "weight", "vectors": "vector"}[group.kind]
        for pattern in group.params:
            if not any(matches(pattern, name) for name in names):
                raise ConfigError(
                    f"optimizer.groups.{group.name}.params: {no_match(pattern, names, what)}"
                )


def _settings(model: nn.Module, groups: Sequence[ParameterGroup]) -> dict[int, dict[str, Any]]:
    """What differs, by the id of the parameter."""
    found: dict[int, dict[str, Any]] = {}
    for group in groups:
        changes = dict(group.options)
        if group.lr_factor is not None:
            changes[LR_FACTOR] = float(group.lr_factor)
        for name, parameter in _of_kind(model, group.kind).items():
            if any(matches(pattern, name) for pattern in group.params):
                found.setdefault(id(parameter), {}).update(changes)
    return found


def _of_kind(model: nn.Module, kind: str) -> dict[str, nn.Parameter]:
    """The trainable parameters of a kind, by logical name."""
    found = trainable_parameters(model)
    if kind == "all":
        return found
    named = weights(model)
    return {name: p for name, p in found.items() if (name in named) == (kind == "weights")}
