"""The inputs that the layers of a model get: sums over them, while earlier layers change.

`observe_layers` finds the layers whose weight is the matrix that multiplies their inputs, and the
order in which the model calls them. `with_inputs` takes one after another, with the inputs that it
gets from the layers before it as they are then: pruned or rounded already.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from trainer.compress.attention import without_fast_path
from trainer.compress.select import ParameterRef
from trainer.data.tree import call_with

_MATRIX_CODE = ("torch.nn.", "trainer.compress.")  # modules whose layers compute as they say
_MAX_COLUMNS = 4096  # inputs of a layer whose correlations are taken into account at a time
_CHUNK = 1 << 24  # values of unfolded images at a time


@dataclass
class ObservedLayer:
    """A layer whose weight multiplies its inputs, and its calls by the original model."""

    layer: nn.Module
    outputs: int
    total: Tensor  # sum of the outputs [channels], float64
    count: int = 0
    partial: bool = False  # a call computed some of the outputs
    calls: list[int] = field(default_factory=list)  # by batch
    source: Tensor | None = None  # its first input
    statistics: "LayerStatistics | None" = None

    @contextmanager
    def rounding(self, correct_bias: bool = True) -> Iterator["LayerStatistics"]:
        """Context in which the weight is rounded, by the statistics of the inputs.

        Args:
            correct_bias: Whether a change of the bias, in place, then restores the mean of the
                outputs, if there is a bias and all outputs of the original layer were seen.
        """
        statistics = self.statistics
        assert statistics is not None
        if not (correct_bias and isinstance(self.layer.bias, Tensor)) or self.partial:
            yield statistics
            return
        statistics.center()
        yield statistics
        mean = statistics.sums / max(1, statistics.count)  # [groups, columns]
        weight = cast(Tensor, self.layer.weight).double()
        outputs = weight.reshape(len(mean), -1, mean.shape[1]) @ mean.unsqueeze(2)
        self.layer.bias.copy_(self.total / max(1, self.count) - outputs.flatten())

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward pre-hook, before the one that quantizes the input."""
        if self.source is None:
            self.source = _first(args, kwargs)
        self.calls[-1] += 1

    def after(self, module: nn.Module, args: Any, output: Tensor) -> None:
        """Forward hook."""
        # Counted from the end: a layer may be called without a dimension for samples.
        channels = -1 - (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)
        flat = output.movedim(channels, 0).unsqueeze(-1).flatten(1)
        if len(flat) != self.outputs:
            self.partial = True
        else:
            self.total = self.total + flat.double().sum(1)
            self.count += flat.shape[1]


def observe_layers(
    model: nn.Module, places: Mapping[str, Sequence[ParameterRef]], inputs: Sequence[Any]
) -> dict[str, ObservedLayer]:
    """Call a model with all inputs.

    Args:
        model: In evaluation mode.
        places: Where the model uses each weight that may be changed.
        inputs: Batches [n, ...] of the model's inputs, on its device; several in a tuple or
            mapping.

    Returns:
        The layers whose weight `is_matrix`, by the name of the weight, in the order of their first
        call; those that are never called are left out.
    """
    handles = []
    order: list[str] = []
    found: dict[str, ObservedLayer] = {}
    for name, refs in places.items():
        if is_matrix(refs):
            layer, weight = refs[0].module, refs[0].value
            one = ObservedLayer(layer, len(weight), weight.new_zeros((), dtype=torch.float64))
            found[name] = one
            handles.append(
                layer.register_forward_pre_hook(one.before, with_kwargs=True, prepend=True)
            )
            handles.append(layer.register_forward_hook(one.after))
            handles.append(layer.register_forward_hook(lambda *_, name=name: order.append(name)))
    try:
        for batch in inputs:
            for one in found.values():
                one.calls.append(0)
            call_with(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in dict.fromkeys(order)}


def with_inputs(
    model: nn.Module,
    observed: Mapping[str, ObservedLayer],
    inputs: Sequence[Any],
    *,
    products: bool,
    together: int = 1,
) -> Iterator[dict[str, ObservedLayer]]:
    """The layers in their order, with the statistics of the inputs that they get now.

    Args:
        model: In evaluation mode.
        observed: What `observe_layers` returned.
        inputs: As for `observe_layers`.
        products: Whether the products of inputs are summed, too.
        together: Number of consecutive inputs that `LayerStatistics.replace` must not separate.

    Yields:
        Layers that get the same input, by the name of the weight. Later layers see the changes that
        the caller makes to these.
    """
    for group in _with_one_input(observed):
        for layer in group.values():
            layer.statistics = LayerStatistics(layer.layer, products, together)
        _run(model, inputs, [*group.values()])
        yield group
        for layer in group.values():
            layer.statistics = None  # its matrices may be large


def _with_one_input(observed: Mapping[str, ObservedLayer]) -> list[dict[str, ObservedLayer]]:
    """Layers in their order; those that follow one another and get the same input together."""
    groups: list[dict[str, ObservedLayer]] = []
    for name, layer in observed.items():
        last = next(reversed(groups[-1].values())) if groups else None
        if last is not None and last.source is layer.source and last.calls == layer.calls:
            groups[-1][name] = layer
        else:
            groups.append({name: layer})
    for layer in observed.values():
        layer.source = None
    return groups


class LayerStatistics:
    """Sums over the inputs of a layer.

    Attributes:
        count: Number of input vectors.
        sums: Of the inputs of each group of channels [groups, columns], float64.
        squares: Of their squares, likewise.
    """

    def __init__(self, layer: nn.Module, products: bool, together: int) -> None:
        self._layer = layer
        weight = cast(Tensor, layer.weight)
        groups, columns = getattr(layer, "groups", 1), weight[0].numel()
        unit = together * weight[0, 0].numel()  # the inputs of a kernel stay together, too
        self._block = unit * max(1, _MAX_COLUMNS // unit) if together > 1 else _MAX_COLUMNS
        self.count = 0
        self.sums = torch.zeros(groups, columns, dtype=torch.float64, device=weight.device)
        self.squares = self.sums.clone()
        # The first input. The products are those of the others less this one: where inputs hardly
        # vary, nothing but rounding errors would remain of products without their mean.
        self._origin: Tensor | None = None
        self._centered = False
        self._products: list[list[Tensor]] = []  # of each group and each block of its columns
        if products:
            sizes = [len(part) for part in torch.arange(columns).split(self._block)]
            self._products = [
                [self.sums.new_zeros(size, size) for size in sizes] for _ in range(groups)
            ]

    def add(self, x: Tensor) -> None:
        """Args: x: An input of the layer."""
        for rows in _columns(self._layer, x):  # [inputs, groups, columns]
            if not len(rows):
                continue
            if self._origin is None:
                self._origin = rows[0].clone()
            self.count += len(rows)
            exact = rows.double()
            self.sums += exact.sum(0)
            self.squares += exact.square().sum(0)
            for group, found in enumerate(self._products):
                shifted = rows[:, group] - self._origin[group]
                for total, part in zip(found, shifted.split(self._block, 1), strict=True):
                    total += (part.t() @ part).double()

    def replace(self, weight: Tensor, new: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        """Replace the weight of the layer, in place, by blocks of its matrix.

        Args:
            weight: [outputs, ...].
            new: Called with a block [outputs of a group, columns], the sum of the products x x^T of
                its inputs [columns, columns] and the number of the group; returns the new block.
        """
        rows = weight.reshape(len(self.sums), -1, self.sums.shape[1])
        made = [
            torch.cat(
                [
                    new(block, self._gram(group, number), group)
                    for number, block in enumerate(rows[group].split(self._block, 1))
                ],
                1,
            )
            for group in range(len(rows))
        ]
        weight.copy_(torch.cat(made).reshape(weight.shape))

    def center(self) -> None:
        """Let the products be those of the inputs without their mean, which a bias restores."""
        self._centered = True

    def _gram(self, group: int, number: int) -> Tensor:
        """The products of the inputs of a block of columns."""
        gram = self._products[group][number]
        if self._origin is None:
            return gram
        count = max(1, self.count)
        sums = self.sums[group].split(self._block)[number]
        origin = self._origin[group].split(self._block)[number].double()
        difference = sums - count * origin  # sum of x - origin
        if self._centered:
            return gram - torch.outer(difference, difference) / count
        cross = torch.outer(origin, difference)
        return gram + cross + cross.t() + count * torch.outer(origin, origin)


def _columns(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The vectors that the matrix of a layer is multiplied with: [inputs, groups, columns] each."""
    x = x.float()
    if not isinstance(layer, _ConvNd):
        return [x.reshape(-1, 1, x.shape[-1])]
    space = len(layer.kernel_size)
    if x.ndim == space + 1:  # no dimension for samples
        x = x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, list(layer._reversed_padding_repeated_twice), mode)
    for place in range(space):
        kernel, step, gap = layer.kernel_size[place], layer.stride[place], layer.dilation[place]
        x = x.unfold(2 + place, (kernel - 1) * gap + 1, step)[..., ::gap]
    # [samples, channels, *positions, *kernel] -> [samples, *positions, channels, *kernel]
    x = x.movedim(1, 1 + space)
    each = max(1, _CHUNK // max(1, x[0].numel()))
    columns = x.shape[1 + space :].numel() // layer.groups
    return [part.reshape(-1, layer.groups, columns) for part in x.split(each)]


def is_matrix(places: Sequence[ParameterRef]) -> bool:
    """Whether a weight is the matrix of one layer that multiplies its input with it.

    A subclass with a forward pass of its own may do something else first, such as padding its input
    or standardizing its weight.
    """
    layer = places[0].module
    if len(places) > 1 or places[0].name != "weight":
        return False
    code = [getattr(type(layer), name, None) for name in ("forward", "_conv_forward")]
    return isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and all(
        method is None or method.__module__.startswith(_MATRIX_CODE) for method in code
    )


class _Reached(Exception):
    """All layers were called as often as they are; the forward pass need not be finished."""


def _run(model: nn.Module, inputs: Sequence[Any], layers: Sequence[ObservedLayer]) -> None:
    """Let the statistics of layers take in their inputs."""
    left = 0

    def before(layer: ObservedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal left
        assert layer.statistics is not None
        layer.statistics.add(_first(args, kwargs))
        left -= 1
        if left == 0:
            raise _Reached

    # After the hook that quantizes the input.
    handles = [
        layer.layer.register_forward_pre_hook(
            lambda _, args, kwargs, layer=layer: before(layer, args, kwargs), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        for number, batch in enumerate(inputs):
            left = sum(layer.calls[number] for layer in layers)
            with suppress(_Reached):
                call_with(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return cast(Tensor, args[0] if args else next(iter(kwargs.values())))


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Context in which a model is in evaluation mode, and layers get ordinary tensors."""
    training = model.training
    model.eval()
    try:
        with without_fast_path():
            yield
    finally:
        model.train(training)
