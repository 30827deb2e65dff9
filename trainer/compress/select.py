"""Which tensors of a model are weights that can be compressed, and how patterns name them.

Names are logical ("fc1.weight", "lstm.weight_hh_l0"): the same before, in and after a phase, and
never those of the parametrizations that a phase installs.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar, cast

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from trainer.compress.parametrize import trainable_parameter
from trainer.errors import ConfigError

T = TypeVar("T")

_LISTED = 8  # names that a message lists; of more names the closest ones

_NORMS = (nn.LayerNorm, nn.RMSNorm)  # scale and bias have two dimensions where two are normalized
_LAYERS = (
    nn.Linear,
    nn.Bilinear,
    _ConvNd,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
# How the weights of those layers are called: weight, weight_ih_l0, in_proj_weight. The old
# weight_norm and spectral_norm append _v and _orig; the scale weight_g is no weight.
_WEIGHT = re.compile(r"((in|q|k|v)_proj_)?weight(_(ih|hh|hr)(_l\d+(_reverse)?)?)?(_v|_orig)?")


class ParameterRef(NamedTuple):
    """Where a model uses a weight."""

    module: nn.Module
    name: str  # attribute of the module

    @property
    def value(self) -> Tensor:
        """The weight as the forward pass sees it."""
        return cast(Tensor, getattr(self.module, self.name))

    @property
    def trainable(self) -> nn.Parameter:
        """The parameter that the optimizer sees: the weight itself, or what makes it."""
        return cast(nn.Parameter, trainable_parameter(self.module, self.name))


def weights(model: nn.Module) -> dict[str, list[ParameterRef]]:
    """All compressible weights by logical name, in the order of the model's modules.

    A floating-point parameter that is not empty is a weight

    - in a layer of torch.nn (Linear, Bilinear, convolutions, embeddings, RNNs and their cells,
      MultiheadAttention), if the layer calls it a weight, whatever its shape;
    - elsewhere, if at least two of its dimensions are larger than 1: a scale of shape [C, 1, 1] is
      as little a weight as one of shape [C].

    What a LayerNorm or RMSNorm has is never a weight, and neither is what the model itself
    parametrizes (torch.nn.utils.parametrizations.weight_norm).

    Returns:
        All the places of each weight. A weight tied under several names is one entry, named by its
        first place.
    """
    return {name: found for name, found in parameters(model).items() if _is_weight(found)}


def vectors(model: nn.Module) -> dict[str, list[ParameterRef]]:
    """The other parameters, such as biases, norms and scales, in the same form as `weights`."""
    return {name: found for name, found in parameters(model).items() if not _is_weight(found)}


def parameters(model: nn.Module) -> dict[str, list[ParameterRef]]:
    """`weights` and `vectors` together."""
    found: dict[str, list[ParameterRef]] = {}
    first: dict[int, str] = {}
    for prefix, module in _modules(model):
        for name in module._parameters:
            parameter = trainable_parameter(module, name)
            if parameter is None:
                continue
            place = ParameterRef(module, name)
            if id(parameter) in first:
                found[first[id(parameter)]].append(place)
                continue
            value = place.value
            if value.is_floating_point() and value.ndim >= 1 and value.numel() > 0:
                first[id(parameter)] = f"{prefix}.{name}" if prefix else name
                found[first[id(parameter)]] = [place]
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters that require a gradient, by logical name; a tied one by its first name.

    They are those that the optimizer sees: of a compressed weight, the tensor that makes it.
    Parameters without dimensions, which are neither in `weights` nor in `vectors`, are included.
    """
    found = {name: places[0].trainable for name, places in parameters(model).items()}
    known = {id(p) for p in found.values()}
    found |= {name: p for name, p in model.named_parameters() if id(p) not in known}
    return {name: p for name, p in found.items() if p.requires_grad}


def _is_weight(places: Sequence[ParameterRef]) -> bool:
    """Whether a parameter is a weight in one of its places; see `weights`."""
    if any(isinstance(module, _LAYERS) and _WEIGHT.fullmatch(name) for module, name in places):
        return True
    large = sum(side > 1 for side in places[0].value.shape)
    return large > 1 and not isinstance(places[0].module, _NORMS)


def match_patterns(patterns: Mapping[str, T], names: Iterable[str]) -> dict[str, T]:
    """The value of every name that a pattern matches; where several do, the last pattern wins.

    Args:
        patterns: shell patterns (*, ?, [abc]) on the name of a weight ("layer1.fc.weight") or of a
            module that contains it ("layer1.fc", "layer1").
        names: logical names of weights.

    Raises:
        ConfigError: a pattern that matches no name.
    """
    names = list(names)
    result: dict[str, T] = {}
    for pattern, value in patterns.items():
        hit = [name for name in names if matches(pattern, name)]
        if not hit:
            raise ConfigError(f"pattern {no_match(pattern, names)}")
        result.update(dict.fromkeys(hit, value))
    return {name: result[name] for name in names if name in result}


def matches(pattern: str, name: str) -> bool:
    """Whether a shell pattern matches a name, or the name of a module that contains it."""
    while name:
        if fnmatchcase(name, pattern):
            return True
        name = module_of(name)
    return False


def no_match(pattern: str, names: Sequence[str], what: str = "weight") -> str:
    """The message for a pattern that matches none of `names`; of many names the closest ones."""
    if len(names) <= _LISTED:
        return f"{pattern!r} matches no {what}; there are {', '.join(names) or 'none'}"
    words = [*names, *dict.fromkeys(module_of(name) for name in names if module_of(name))]
    close = difflib.get_close_matches(pattern, words, _LISTED, cutoff=0)
    return f"{pattern!r} matches no {what}; the closest names are {', '.join(close)}"


def select_weights(
    model: nn.Module, include: Iterable[str], exempt: Iterable[str]
) -> dict[str, list[ParameterRef]]:
    """The weights that a pattern of `include` matches and none of `exempt`; see `match`.

    Raises:
        ConfigError: a pattern that matches no weight, or no weight is left.
    """
    places = weights(model)
    if not places:
        reason = ""
        if any(is_parametrized(module) for module in model.modules()):
            reason = (
                "; layers with torch.nn.utils.parametrizations, such as weight_norm, are left as "
                "they are"
            )
        raise ConfigError(f"the model has no weights that can be compressed{reason}")
    wanted = match_patterns(dict.fromkeys(include, True) | dict.fromkeys(exempt, False), places)
    chosen = {name: found for name, found in places.items() if wanted.get(name)}
    if not chosen:
        raise ConfigError(f"include={[*include]}, exempt={[*exempt]}: no weight is left")
    return chosen


def module_of(name: str) -> str:
    """ "fc1" of "fc1.weight"; empty for a weight of the model itself."""
    return name.rpartition(".")[0]


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules but those inside parametrizations."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if isinstance(module, ParametrizationList) or is_parametrized(module):
            lists = module if isinstance(module, ParametrizationList) else module.parametrizations
            inside.update(id(m) for m in cast(nn.Module, lists).modules())
        if id(module) not in inside:
            yield name, module
