"""Which slices of which parameters have to be removed together, so that a smaller model remains.

Removing an output channel of one layer removes the same input channel of every layer that reads it,
the entries of a batch norm between them, and, where two layers are added, the channel of the other
one. Such a set of slices is a `Unit`: a channel, a hidden unit, or an attention head. (Fang et al.,
DepGraph, CVPR 2023, arXiv:2301.12900, find the same sets from a graph of layers.)

The sets are found by one forward pass. Every position along every dimension of a tensor carries a
label, and each operator that torch runs merges labels of positions that stand or fall together: the
rows and columns of a matrix product, the channels of two summands. Zero is the label of what must
stay, such as the pixels of an image, the model's inputs and outputs, and everything that an
operator unknown here has touched.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.compress.attention import unfused_attention

Labels = NDArray[np.int64]  # one per position of a dimension
_aten = torch.ops.aten

_FIXED = 0  # the label of what must stay
_MIN_SIZE = 2  # of a dimension from which something can be removed


@dataclass(frozen=True)
class Part:
    """Positions along a dimension of a parameter or buffer that belong to one unit."""

    name: str  # in the state_dict
    dim: int
    positions: tuple[int, ...]


@dataclass(frozen=True)
class Unit:
    """What is removed as a whole: a channel, a hidden unit, an attention head."""

    parts: tuple[Part, ...]

    @property
    def dimensions(self) -> frozenset[tuple[str, int]]:
        """The dimensions that it is removed from: units of one layer have the same ones."""
        return frozenset((part.name, part.dim) for part in self.parts)


@torch.no_grad()
def removable_units(model: nn.Module, inputs: Tensor) -> list[Unit]:
    """The units of a model, in the order of its parameters.

    Args:
        model: With plain weights; its mode is restored afterwards.
        inputs: A batch of at least two samples, on the model's device.
    """
    tracer = _Tracer(model)
    training = model.training
    try:
        model.eval()
        with unfused_attention(), torch.autocast(inputs.device.type, enabled=False), tracer:
            outputs = model(inputs)
    finally:
        model.train(training)
    for leaf in tree_leaves(outputs):
        tracer.fix(leaf)
    return tracer.units()


class _Tracer(TorchDispatchMode):
    """Follows the labels of all dimensions through the operators that run while it is active."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._parent = [_FIXED]  # of each label: the forest of a union-find structure
        # Labels of each dimension by the id of a tensor, which is kept so that no other gets it.
        self._labels: dict[int, tuple[Tensor, list[Labels]]] = {}
        # What must stay if a tensor is used, such as weights of attention that only reports show.
        self._pending: dict[int, list[Labels]] = {}
        self._own: list[tuple[str, list[Labels]]] = []  # of parameters and buffers
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or tensor.ndim == 0:
                continue
            labels = [self._new(size) for size in tensor.shape]
            self._labels[id(tensor)] = (tensor, labels)
            self._own.append((name, labels))

    def units(self) -> list[Unit]:
        """The sets of merged labels that need not stay."""
        parts: dict[int, list[Part]] = {}
        for name, dims in self._own:
            for dim, labels in enumerate(dims):
                roots = self._roots(labels)
                for root in dict.fromkeys(roots.tolist()):
                    if root != _FIXED:
                        positions = tuple(np.flatnonzero(roots == root).tolist())
                        parts.setdefault(root, []).append(Part(name, dim, positions))
        # What only one parameter has was never multiplied with anything.
        return [Unit(tuple(found)) for found in parts.values() if len(found) > 1]

    def fix(self, value: Any) -> None:
        """Whatever a tensor depends on along its dimensions must stay."""
        self._use(value)
        for labels in self._of(value):
            self._merge(labels, _fixed(len(labels)))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            self._use(leaf)
        result = func(*args, **kwargs)
        handler = _HANDLERS.get(func._overloadpacket)
        if handler is not None:
            labels = handler(self, args, kwargs, result)
        elif torch.Tag.pointwise in func.tags:
            labels = self._pointwise(args, kwargs, result)
        else:
            for leaf in tree_leaves((args, kwargs)):
                self.fix(leaf)
            labels = None
        if labels is not None:
            self._set(result, labels)
        return result

    def _use(self, value: Any) -> None:
        for labels in self._pending.pop(id(value), ()):
            self._merge(labels, _fixed(len(labels)))

    def _new(self, size: int) -> Labels:
        if size < _MIN_SIZE:
            return _fixed(size)
        first = len(self._parent)
        self._parent.extend(range(first, first + size))
        return np.arange(first, first + size)

    def _root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    def _roots(self, labels: Labels) -> Labels:
        return np.array([self._root(label) for label in labels.tolist()], np.int64)

    def _merge(self, one: Labels, other: Labels) -> None:
        """The positions of two dimensions stand or fall together, one by one."""
        if len(one) != len(other):
            one, other = np.append(one, other), _fixed(len(one) + len(other))
        if np.array_equal(one, other):
            return
        for left, right in zip(one.tolist(), other.tolist(), strict=True):
            a, b = self._root(left), self._root(right)
            if a != b:
                self._parent[max(a, b)] = min(a, b)  # so that _FIXED stays a root

    def _of(self, value: Any) -> list[Labels]:
        """Labels of each dimension; those of an unknown tensor are fixed."""
        if not isinstance(value, Tensor):
            return []
        known = self._labels.get(id(value))
        if known is not None and [len(labels) for labels in known[1]] == list(value.shape):
            return known[1]
        return [_fixed(size) for size in value.shape]

    def _set(self, value: Any, labels: Sequence[Labels]) -> None:
        if isinstance(value, Tensor):
            assert [len(found) for found in labels] == list(value.shape)
            self._labels[id(value)] = (value, list(labels))

    def _free(self, labels: Labels) -> bool:
        """Whether a dimension has a position that need not stay."""
        return bool(self._roots(labels).any())

    # Each handler returns the labels of the result's dimensions, or None if it has set them itself.

    def _pointwise(self, args: Any, kwargs: Any, result: Any) -> list[Labels] | None:
        """Dimensions of the same size are aligned from the last one."""
        if not isinstance(result, Tensor):
            for leaf in tree_leaves((args, kwargs)):
                self.fix(leaf)
            return None
        labels = [_fixed(size) for size in result.shape]
        seen = [False] * result.ndim
        for leaf in tree_leaves((args, kwargs)):
            for place, found in enumerate(reversed(self._of(leaf)), start=1):
                if len(found) != len(labels[-place]) or len(found) < _MIN_SIZE:
                    continue
                if seen[-place]:
                    self._merge(labels[-place], found)
                else:
                    labels[-place], seen[-place] = found, True
        return labels

    def _reshape(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        """Dimensions are merged or split within blocks of the same number of elements."""
        before, labels = self._of(args[0]), [_fixed(size) for size in result.shape]
        for sources, targets in _blocks(args[0].shape, result.shape):
            self._reshape_block([before[d] for d in sources], targets, labels, result.shape)
        return labels

    def _reshape_block(
        self,
        sources: list[Labels],
        targets: Sequence[int],
        labels: list[Labels],
        shape: Sequence[int],
    ) -> None:
        free = [place for place, found in enumerate(sources) if self._free(found)]
        if not free:
            return
        if len(free) > 1:  # a position would belong to several units
            for found in sources:
                self._merge(found, _fixed(len(found)))
            return
        (place,) = free
        around = [1] * len(sources)
        around[place] = -1
        sizes = [len(found) for found in sources]
        flat = np.broadcast_to(sources[place].reshape(around), sizes).reshape(-1)
        wide = [target for target in targets if shape[target] > 1]
        grid = flat.reshape([shape[target] for target in wide])
        # A dimension that is split has its units along one part: [heads, size of a head], or
        # [queries keys values, heads, size of a head].
        chosen = _varying(grid)
        if chosen is None:
            chosen = max(0, len(wide) - 2)
        rows = np.moveaxis(grid, chosen, 0).reshape(grid.shape[chosen], -1)
        for column in rows.T[1:]:
            self._merge(rows[:, 0], column)
        labels[wide[chosen]] = rows[:, 0].copy()

    def _permute(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        labels = self._of(args[0])
        return [labels[dim] for dim in args[1]]

    def _transpose(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        labels = list(self._of(args[0]))
        one, other = args[1:] or (0, -1)
        labels[one], labels[other] = labels[other], labels[one]
        return labels

    def _t(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        return list(reversed(self._of(args[0])))

    def _same(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        return self._of(args[0])

    def _nothing(self, args: Any, kwargs: Any, result: Any) -> list[Labels] | None:
        """Values do not depend on those of the arguments."""
        return [_fixed(size) for size in result.shape] if isinstance(result, Tensor) else None

    def _expand(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        before = self._of(args[0])
        labels = [_fixed(size) for size in result.shape]
        for place, found in enumerate(reversed(before), start=1):
            if len(found) == result.shape[-place]:
                labels[-place] = found
        return labels

    def _slice(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        labels = list(self._of(args[0]))
        dim = args[1] if len(args) > 1 else 0
        start, end, step = [*args[2:5], None, None, None][:3]
        labels[dim] = labels[dim][slice(start, end, step)]
        return labels

    def _select(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        labels = list(self._of(args[0]))
        dropped = labels.pop(args[1])
        self._merge(dropped, _fixed(len(dropped)))
        return labels

    def _split(self, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
        dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
        labels, start = self._of(args[0]), 0
        for piece in result:
            end = start + piece.shape[dim]
            own = list(labels)
            own[dim] = labels[dim][start:end]
            self._set(piece, own)
            start = end

    def _unbind(self, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
        labels = list(self._of(args[0]))
        dropped = labels.pop(args[1] if len(args) > 1 else 0)
        self._merge(dropped, _fixed(len(dropped)))
        for piece in result:
            self._set(piece, labels)

    def _cat(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        pieces = [self._of(piece) for piece in args[0] if piece.numel()]
        labels = list(pieces[0])
        for piece in pieces[1:]:
            for place, found in enumerate(piece):
                if place != dim % result.ndim:
                    self._merge(labels[place], found)
        labels[dim] = np.concatenate([piece[dim] for piece in pieces])
        return labels

    def _pad(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        labels = list(self._of(args[0]))
        amounts = args[1]
        for place in range(len(amounts) // 2):
            before, after = amounts[2 * place : 2 * place + 2]
            found = labels[-1 - place]
            if before < 0 or after < 0:
                self._merge(found, _fixed(len(found)))
                labels[-1 - place] = _fixed(result.shape[-1 - place])
            else:
                labels[-1 - place] = np.concatenate([_fixed(before), found, _fixed(after)])
        return labels

    def _matmul(self, left: Any, right: Any) -> list[Labels]:
        """[*batch, n, k] x [*batch, k, m]."""
        one, other = self._of(left), self._of(right)
        self._merge(one[-1], other[-2])
        for a, b in zip(one[:-2], other[:-2], strict=True):
            self._merge(a, b)
        return [*one[:-1], other[-1]]

    def _mm(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        return self._matmul(*args[:2])

    def _addmm(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        labels = self._matmul(*args[1:3])
        return self._pointwise_with(labels, args[0], result)

    def _pointwise_with(self, labels: list[Labels], other: Any, result: Tensor) -> list[Labels]:
        for place, found in enumerate(reversed(self._of(other)), start=1):
            if len(found) == result.shape[-place] and len(found) >= _MIN_SIZE:
                self._merge(labels[-place], found)
        return labels

    def _convolution(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        x, weight, bias, _, _, _, transposed, _, groups = args[:9]
        inputs, filters = self._of(x), list(self._of(weight))
        for labels in (*inputs[2:], *filters[2:]):
            self._merge(labels, _fixed(len(labels)))
        if transposed:
            filters[0], filters[1] = filters[1], filters[0]
        # Now [outputs, inputs per group] or, if transposed, [outputs per group, inputs].
        outputs = self._grouped(inputs[1], filters, groups, transposed)
        if isinstance(bias, Tensor):
            self._merge(outputs, self._of(bias)[0])
        return [inputs[0], outputs, *[_fixed(size) for size in result.shape[2:]]]

    def _grouped(self, x: Labels, filters: list[Labels], groups: int, transposed: bool) -> Labels:
        """Merge the channels of a convolution's inputs and weight; the labels of its outputs.

        Each group must keep as many channels as every other: the n-th ones stand or fall together.
        With one input per group, a whole group is removed instead.
        """
        if transposed:
            self._merge(x, filters[1])
            if groups == 1:
                return filters[0]
            for labels in (x, filters[0]):
                self._merge(labels, _fixed(len(labels)))
            return np.tile(filters[0], groups)
        outputs = filters[0]
        if groups == 1:
            self._merge(x, filters[1])
        elif len(x) == groups:
            self._merge(np.repeat(x, len(outputs) // groups), outputs)
        else:
            for group in x.reshape(groups, -1):
                self._merge(group, filters[1])
            rows = outputs.reshape(groups, -1)
            for row in rows[1:]:
                self._merge(rows[0], row)
        return outputs

    def _batch_norm(self, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
        labels = self._of(args[0])
        for vector in args[1:5]:
            if isinstance(vector, Tensor):
                self._merge(labels[1], self._of(vector)[0])
        self._set(result[0], labels)

    def _layer_norm(self, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
        """What is normalized together must stay: fewer values would have another mean."""
        labels = self._of(args[0])
        for labels_of_one in labels[-len(args[1]) :]:
            self._merge(labels_of_one, _fixed(len(labels_of_one)))
        for vector in args[2:4]:
            self.fix(vector)
        self._set(result[0], labels)

    def _group_norm(self, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
        labels = self._of(args[0])
        self._merge(labels[1], _fixed(len(labels[1])))
        for vector in args[1:3]:
            self.fix(vector)
        self._set(result[0], labels)

    def _pool(self, args: Any, kwargs: Any, result: Any) -> None:
        """Samples and channels stay what they are; positions in space must stay."""
        labels = self._of(args[0])
        outputs = result if isinstance(result, tuple) else (result,)
        space = _SPACE.get(len(labels), len(labels) - 2)
        for found in labels[-space:]:
            self._merge(found, _fixed(len(found)))
        for output in outputs:
            self._set(output, [*labels[:-space], *[_fixed(s) for s in output.shape[-space:]]])

    def _reduce(self, args: Any, kwargs: Any, result: Any) -> None:
        """Along the reduced dimensions everything must stay, if the result is used."""
        labels = self._of(args[0])
        dims = args[1] if len(args) > 1 else kwargs.get("dim")
        if dims is None or isinstance(dims, bool) or (isinstance(dims, list) and not dims):
            dims = list(range(len(labels)))
        reduced = {dim % max(1, len(labels)) for dim in ([dims] if isinstance(dims, int) else dims)}
        for output in result if isinstance(result, tuple) else (result,):
            if output.ndim == len(labels):
                kept = [_fixed(1) if d in reduced else found for d, found in enumerate(labels)]
            else:
                kept = [found for dim, found in enumerate(labels) if dim not in reduced]
            self._set(output, kept)
            self._pending[id(output)] = [labels[dim] for dim in reduced]

    def _along(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        """As `_reduce`, but the result keeps the dimension."""
        labels = self._of(args[0])
        self._merge(labels[args[1]], _fixed(len(labels[args[1]])))
        return labels

    def _embedding(self, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
        rows, values = self._of(args[0])
        self._merge(rows, _fixed(len(rows)))
        return [*self._of(args[1]), values]

    def _attention(self, args: Any, kwargs: Any, result: Any) -> None:
        """Queries, keys and values [samples, heads, length, size]."""
        queries, keys, values = (self._of(part) for part in args[:3])
        for other in (keys, values):
            self._merge(queries[0], other[0])
            self._merge(queries[1], other[1])
        for labels in (queries[3], keys[3]):  # the scale of the scores depends on the size
            self._merge(labels, _fixed(len(labels)))
        for part in args[3:]:
            self.fix(part)
        output = result[0] if isinstance(result, tuple) else result
        self._set(output, [*queries[:3], values[3]])


_Handler = Callable[[_Tracer, Any, Any, Any], "list[Labels] | None"]

# Dimensions in space of pooled or resized tensors, by their number of dimensions.
_SPACE = {3: 1, 4: 2, 5: 3}

_KINDS: dict[Any, tuple[str, ...]] = {
    _Tracer._reshape: ("view", "_unsafe_view", "unsqueeze", "squeeze", "_reshape_alias"),
    _Tracer._permute: ("permute",),
    _Tracer._transpose: ("transpose",),
    _Tracer._t: ("t",),
    _Tracer._same: ("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "fill_"),
    _Tracer._nothing: (
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "new_zeros"),
        *("new_ones", "new_empty", "new_full", "sym_size", "sym_numel", "is_same_size"),
    ),
    _Tracer._expand: ("expand",),
    _Tracer._slice: ("slice",),
    _Tracer._select: ("select",),
    _Tracer._split: ("split", "split_with_sizes"),
    _Tracer._unbind: ("unbind",),
    _Tracer._cat: ("cat",),
    _Tracer._pad: ("constant_pad_nd",),
    _Tracer._mm: ("mm", "bmm"),
    _Tracer._addmm: ("addmm", "baddbmm"),
    _Tracer._convolution: ("convolution",),
    _Tracer._batch_norm: (
        *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"),
        "_native_batch_norm_legit_no_training",
    ),
    _Tracer._layer_norm: ("native_layer_norm",),
    _Tracer._group_norm: ("native_group_norm",),
    _Tracer._pool: (
        *("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"),
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d"),
    ),
    _Tracer._reduce: ("mean", "sum", "amax", "amin", "var", "std", "max", "min"),
    _Tracer._along: ("_softmax", "_log_softmax", "_safe_softmax", "cumsum"),
    _Tracer._embedding: ("embedding",),
    _Tracer._attention: (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
    ),
}
_HANDLERS: dict[Any, _Handler] = {
    getattr(_aten, name): handler
    for handler, names in _KINDS.items()
    for name in names
    if hasattr(_aten, name)
}


def _fixed(size: int) -> Labels:
    return np.full(size, _FIXED, np.int64)


def _varying(grid: Labels) -> int | None:
    """The only dimension along which the labels differ; None if there are several."""
    found = [axis for axis in range(grid.ndim) if bool((np.take(grid, [0], axis) != grid).any())]
    return found[0] if len(found) == 1 else None


def _blocks(before: Iterable[int], after: Iterable[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of dimensions of two shapes that hold the same number of elements."""
    sources, targets = list(before), list(after)
    if math.prod(sources) == 0:
        return []
    found = []
    i = j = 0
    while i < len(sources) and j < len(targets):
        one, other = [i], [j]
        left, right = sources[i], targets[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                left *= sources[i]
                one.append(i)
                i += 1
            else:
                right *= targets[j]
                other.append(j)
                j += 1
        found.append((one, other))
    return found
