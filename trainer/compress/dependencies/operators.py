"""How each operator of torch merges the labels of its arguments and passes them to its results."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from trainer.compress.dependencies.labels import MIN_SIZE, Labels, LabelTable, fixed

_aten = torch.ops.aten


def propagate(table: LabelTable, func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Enter the labels of what an operator has returned.

    All dimensions of the arguments of an operator that is unknown here must stay.

    Args:
        table: The labels so far.
        func: The operator, an `OpOverload`.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned.
    """
    for leaf in tree_leaves((args, kwargs)):
        table.use(leaf)
    handler = _HANDLERS.get(func._overloadpacket)
    if handler is not None:
        labels = handler(table, args, kwargs, result)
    elif torch.Tag.pointwise in func.tags:
        labels = _pointwise(table, args, kwargs, result)
    else:
        for leaf in tree_leaves((args, kwargs)):
            table.fix_tensor(leaf)
        labels = None
    if labels is not None:
        table.set(result, labels)


# Each handler returns the labels of the result's dimensions, or None if it has set them itself.


def _pointwise(table: LabelTable, args: Any, kwargs: Any, result: Any) -> list[Labels] | None:
    """Dimensions of the same size are aligned from the last one."""
    if not isinstance(result, Tensor):
        for leaf in tree_leaves((args, kwargs)):
            table.fix_tensor(leaf)
        return None
    labels = [fixed(size) for size in result.shape]
    seen = [False] * result.ndim
    for leaf in tree_leaves((args, kwargs)):
        for place, found in enumerate(reversed(table.of(leaf)), start=1):
            if len(found) != len(labels[-place]) or len(found) < MIN_SIZE:
                continue
            if seen[-place]:
                table.merge(labels[-place], found)
            else:
                labels[-place], seen[-place] = found, True
    return labels


def _reshape(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """Dimensions are merged or split within blocks of the same number of elements."""
    before, labels = table.of(args[0]), [fixed(size) for size in result.shape]
    for sources, targets in _blocks(args[0].shape, result.shape):
        _reshape_block(table, [before[d] for d in sources], targets, labels, result.shape)
    return labels


def _reshape_block(
    table: LabelTable,
    sources: list[Labels],
    targets: Sequence[int],
    labels: list[Labels],
    shape: Sequence[int],
) -> None:
    free = [place for place, found in enumerate(sources) if table.is_free(found)]
    if not free:
        return
    if len(free) > 1:  # a position would belong to several units
        for found in sources:
            table.fix(found)
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
        table.merge(rows[:, 0], column)
    labels[wide[chosen]] = rows[:, 0].copy()


def _permute(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels = table.of(args[0])
    return [labels[dim] for dim in args[1]]


def _transpose(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels = list(table.of(args[0]))
    one, other = args[1:] or (0, -1)
    labels[one], labels[other] = labels[other], labels[one]
    return labels


def _t(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    return list(reversed(table.of(args[0])))


def _same(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    return table.of(args[0])


def _nothing(table: LabelTable, args: Any, kwargs: Any, result: Any) -> list[Labels] | None:
    """Values do not depend on those of the arguments."""
    return [fixed(size) for size in result.shape] if isinstance(result, Tensor) else None


def _expand(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    before = table.of(args[0])
    labels = [fixed(size) for size in result.shape]
    for place, found in enumerate(reversed(before), start=1):
        if len(found) == result.shape[-place]:
            labels[-place] = found
    return labels


def _slice(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels = list(table.of(args[0]))
    dim = args[1] if len(args) > 1 else 0
    start, end, step = [*args[2:5], None, None, None][:3]
    labels[dim] = labels[dim][slice(start, end, step)]
    return labels


def _select(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels = list(table.of(args[0]))
    dropped = labels.pop(args[1])
    table.fix(dropped)
    return labels


def _split(table: LabelTable, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    labels, start = table.of(args[0]), 0
    for piece in result:
        end = start + piece.shape[dim]
        own = list(labels)
        own[dim] = labels[dim][start:end]
        table.set(piece, own)
        start = end


def _unbind(table: LabelTable, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
    labels = list(table.of(args[0]))
    dropped = labels.pop(args[1] if len(args) > 1 else 0)
    table.fix(dropped)
    for piece in result:
        table.set(piece, labels)


def _cat(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    pieces = [table.of(piece) for piece in args[0] if piece.numel()]
    labels = list(pieces[0])
    for piece in pieces[1:]:
        for place, found in enumerate(piece):
            if place != dim % result.ndim:
                table.merge(labels[place], found)
    labels[dim] = np.concatenate([piece[dim] for piece in pieces])
    return labels


def _pad(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels = list(table.of(args[0]))
    amounts = args[1]
    for place in range(len(amounts) // 2):
        before, after = amounts[2 * place : 2 * place + 2]
        found = labels[-1 - place]
        if before < 0 or after < 0:
            table.fix(found)
            labels[-1 - place] = fixed(result.shape[-1 - place])
        else:
            labels[-1 - place] = np.concatenate([fixed(before), found, fixed(after)])
    return labels


def _matmul(table: LabelTable, left: Any, right: Any) -> list[Labels]:
    """[*batch, n, k] x [*batch, k, m]."""
    one, other = table.of(left), table.of(right)
    table.merge(one[-1], other[-2])
    for a, b in zip(one[:-2], other[:-2], strict=True):
        table.merge(a, b)
    return [*one[:-1], other[-1]]


def _mm(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    return _matmul(table, *args[:2])


def _addmm(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    labels = _matmul(table, *args[1:3])
    return _pointwise_with(table, labels, args[0], result)


def _pointwise_with(
    table: LabelTable, labels: list[Labels], other: Any, result: Tensor
) -> list[Labels]:
    for place, found in enumerate(reversed(table.of(other)), start=1):
        if len(found) == result.shape[-place] and len(found) >= MIN_SIZE:
            table.merge(labels[-place], found)
    return labels


def _convolution(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    x, weight, bias, _, _, _, transposed, _, groups = args[:9]
    inputs, filters = table.of(x), list(table.of(weight))
    for labels in (*inputs[2:], *filters[2:]):
        table.fix(labels)
    if transposed:
        filters[0], filters[1] = filters[1], filters[0]
    # Now [outputs, inputs per group] or, if transposed, [outputs per group, inputs].
    outputs = _grouped(table, inputs[1], filters, groups, transposed)
    if isinstance(bias, Tensor):
        table.merge(outputs, table.of(bias)[0])
    return [inputs[0], outputs, *[fixed(size) for size in result.shape[2:]]]


def _grouped(
    table: LabelTable, x: Labels, filters: list[Labels], groups: int, transposed: bool
) -> Labels:
    """Merge the channels of a convolution's inputs and weight; the labels of its outputs.

    Each group must keep as many channels as every other: the n-th ones stand or fall together.
    With one input per group, a whole group is removed instead.
    """
    if transposed:
        table.merge(x, filters[1])
        if groups == 1:
            return filters[0]
        for labels in (x, filters[0]):
            table.fix(labels)
        return np.tile(filters[0], groups)
    outputs = filters[0]
    if groups == 1:
        table.merge(x, filters[1])
    elif len(x) == groups:
        table.merge(np.repeat(x, len(outputs) // groups), outputs)
    else:
        for group in x.reshape(groups, -1):
            table.merge(group, filters[1])
        rows = outputs.reshape(groups, -1)
        for row in rows[1:]:
            table.merge(rows[0], row)
    return outputs


def _batch_norm(table: LabelTable, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
    labels = table.of(args[0])
    for vector in args[1:5]:
        if isinstance(vector, Tensor):
            table.merge(labels[1], table.of(vector)[0])
    table.set(result[0], labels)


def _layer_norm(table: LabelTable, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
    """What is normalized together must stay: fewer values would have another mean."""
    labels = table.of(args[0])
    for labels_of_one in labels[-len(args[1]) :]:
        table.fix(labels_of_one)
    for vector in args[2:4]:
        table.fix_tensor(vector)
    table.set(result[0], labels)


def _group_norm(table: LabelTable, args: Any, kwargs: Any, result: Sequence[Tensor]) -> None:
    labels = table.of(args[0])
    table.fix(labels[1])
    for vector in args[1:3]:
        table.fix_tensor(vector)
    table.set(result[0], labels)


def _pool(table: LabelTable, args: Any, kwargs: Any, result: Any) -> None:
    """Samples and channels stay what they are; positions in space must stay."""
    labels = table.of(args[0])
    outputs = result if isinstance(result, tuple) else (result,)
    space = _SPACE.get(len(labels), len(labels) - 2)
    for found in labels[-space:]:
        table.fix(found)
    for output in outputs:
        table.set(output, [*labels[:-space], *[fixed(s) for s in output.shape[-space:]]])


def _reduce(table: LabelTable, args: Any, kwargs: Any, result: Any) -> None:
    """Along the reduced dimensions everything must stay, if the result is used."""
    labels = table.of(args[0])
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if dims is None or isinstance(dims, bool) or (isinstance(dims, list) and not dims):
        dims = list(range(len(labels)))
    reduced = {dim % max(1, len(labels)) for dim in ([dims] if isinstance(dims, int) else dims)}
    for output in result if isinstance(result, tuple) else (result,):
        if output.ndim == len(labels):
            kept = [fixed(1) if d in reduced else found for d, found in enumerate(labels)]
        else:
            kept = [found for dim, found in enumerate(labels) if dim not in reduced]
        table.set(output, kept)
        table.fix_if_used(output, [labels[dim] for dim in reduced])


def _along(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    """As `_reduce`, but the result keeps the dimension."""
    labels = table.of(args[0])
    table.fix(labels[args[1]])
    return labels


def _embedding(table: LabelTable, args: Any, kwargs: Any, result: Tensor) -> list[Labels]:
    rows, values = table.of(args[0])
    table.fix(rows)
    return [*table.of(args[1]), values]


def _attention(table: LabelTable, args: Any, kwargs: Any, result: Any) -> None:
    """Queries, keys and values [samples, heads, length, size]."""
    queries, keys, values = (table.of(part) for part in args[:3])
    for other in (keys, values):
        table.merge(queries[0], other[0])
        table.merge(queries[1], other[1])
    for labels in (queries[3], keys[3]):  # the scale of the scores depends on the size
        table.fix(labels)
    for part in args[3:]:
        table.fix_tensor(part)
    output = result[0] if isinstance(result, tuple) else result
    table.set(output, [*queries[:3], values[3]])


def _lstm(table: LabelTable, args: Any, kwargs: Any, result: Any) -> None:
    """Only features of the inputs [length, samples, features] can be removed."""
    table.merge(table.of(args[0])[-1], table.of(args[1])[-1])
    for labels in (*table.of(args[0])[:-1], *table.of(args[1])[:-1]):
        table.fix(labels)
    for part in args[2:7]:
        table.fix_tensor(part)


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


_Handler = Callable[[LabelTable, Any, Any, Any], "list[Labels] | None"]

# Dimensions in space of pooled or resized tensors, by their number of dimensions.
_SPACE = {3: 1, 4: 2, 5: 3}

_KINDS: dict[Any, tuple[str, ...]] = {
    _reshape: ("view", "_unsafe_view", "unsqueeze", "squeeze", "_reshape_alias"),
    _permute: ("permute",),
    _transpose: ("transpose",),
    _t: ("t",),
    _same: ("clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh", "fill_"),
    _nothing: (
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "new_zeros"),
        *("new_ones", "new_empty", "new_full", "sym_size", "sym_numel", "is_same_size"),
    ),
    _expand: ("expand",),
    _slice: ("slice",),
    _select: ("select",),
    _split: ("split", "split_with_sizes"),
    _unbind: ("unbind",),
    _cat: ("cat",),
    _pad: ("constant_pad_nd",),
    _mm: ("mm", "bmm"),
    _addmm: ("addmm", "baddbmm"),
    _convolution: ("convolution",),
    _batch_norm: (
        *("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"),
        "_native_batch_norm_legit_no_training",
    ),
    _layer_norm: ("native_layer_norm",),
    _group_norm: ("native_group_norm",),
    _pool: (
        *("max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d"),
        *("_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d"),
        *("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"),
        *("upsample_bilinear2d", "upsample_bicubic2d", "upsample_linear1d"),
    ),
    _reduce: ("mean", "sum", "amax", "amin", "var", "std", "max", "min"),
    _along: ("_softmax", "_log_softmax", "_safe_softmax", "cumsum"),
    _embedding: ("embedding",),
    _lstm: ("mkldnn_rnn_layer",),
    _attention: (
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
