"""Which weights survive pruning by magnitude: pure functions, tensors in, masks out.

Selection is exact and deterministic on every device: among equal magnitudes the one with the lowest
index (in row-major order, whatever the memory format) stays. It reads the weights in pieces and
needs no sorted or concatenated copy: a histogram of the upper 15 bits of |w| finds the narrow range
in which the threshold lies, and only the few values in there are sorted.
"""

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from trainer.errors import Diverged

_BINS = 1 << 15  # the upper bits of a float without its sign order magnitudes
_PIECE = 1 << 22  # elements at a time: little memory, and few enough calls
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def cubic_sparsity(
    progress: float, initial: float, final: float, begin: float, end: float
) -> float:
    """The sparsity at `progress` of a ramp that is steep at first, when weights are redundant.

    s = final + (initial - final) * (1 - (progress - begin) / (end - begin))^3 between begin and
    end, initial before, final after. Zhu & Gupta, "To prune, or not to prune", 2017,
    arXiv:1710.01878, equation 1.

    Args:
        progress, begin, end: fractions of the training, in [0, 1], begin < end.
        initial, final: sparsities in [0, 1].
    """
    left = 1 - (progress - begin) / (end - begin)
    left = min(1.0, max(0.0, left))
    return final + (initial - final) * left**3


def largest(weight: Tensor, keep: int) -> Tensor:
    """The mask of the `keep` largest |weight|: bool, in the shape and strides of `weight`.

    Raises:
        ValueError: `keep` is outside [0, numel].
        Diverged: a value is Inf or NaN.
    """
    _check(keep, weight.numel())
    mask = torch.zeros_like(weight, dtype=torch.bool, requires_grad=False)
    if keep == weight.numel():
        return mask.fill_(True)
    if keep == 0:
        return mask
    flat = weight.detach().flatten()
    above, bin_ = _boundary(_histogram(flat, flat.dtype), keep)
    inside = _magnitudes_in(flat, flat.dtype, bin_)
    threshold = inside.sort(descending=True).values[keep - above - 1]
    ties = keep - above - int((inside > threshold).sum())
    kept = torch.empty(flat.shape, dtype=torch.bool, device=flat.device)
    for piece, out in zip(_pieces(flat), _pieces(kept), strict=True):
        magnitude = _magnitude(piece, flat.dtype)
        torch.gt(magnitude, threshold, out=out)
        if ties:
            equal = (magnitude == threshold).nonzero().squeeze(1)[:ties]
            out[equal] = True
            ties -= len(equal)
    return mask.copy_(kept.view(weight.shape))


def largest_in_groups(weight: Tensor, keep: int, size: int) -> Tensor:
    """The mask of the `keep` largest |weight| of each `size` consecutive inputs of an output.

    Inputs are the second dimension. Among equal magnitudes the first stays. Runtimes with kernels
    for such patterns (2 of 4) need no positions of single weights: Mishra et al., 2021,
    arXiv:2104.08378.

    Args:
        weight: [out, in, ...], `in` a multiple of `size`.
        keep: Weights that stay in each group.
        size: Weights of a group.

    Raises:
        Diverged: A value is Inf or NaN.
    """
    _check_finite(weight)
    groups = weight.detach().abs().movedim(1, -1).unflatten(-1, (-1, size))
    order = groups.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order[..., :keep], True)
    mask = torch.zeros_like(weight, dtype=torch.bool, requires_grad=False)
    return mask.copy_(kept.flatten(-2).movedim(-1, 1))


def largest_in_rows(score: Tensor, keep: int) -> Tensor:
    """The mask of the largest values of each row, `keep` in all.

    Every row keeps as many, up to one: where `keep` is no multiple of the rows, those whose next
    value is largest keep one more. Among equal values the first stays.

    Args:
        score: [rows, columns], not negative.

    Returns:
        Bool, [rows, columns].

    Raises:
        Diverged: A value is Inf or NaN.
    """
    _check_finite(score)
    each, more = divmod(keep, len(score))
    order = score.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, :each], True)
    if more:
        following = order[:, each : each + 1]
        rows = score.gather(1, following).flatten().argsort(descending=True, stable=True)[:more]
        mask[rows, following[rows, 0]] = True
    return mask


def kept_counts(weights: Sequence[Tensor], keep: int, floors: Sequence[int]) -> list[int]:
    """How many of each tensor stay when the `keep` largest |w| of all are kept, but no fewer than
    its floor of each. One threshold decides for all tensors above their floor.

    `largest(weight, n)` for each result makes the masks. Without floors a common threshold may
    remove whole layers whose weights are small. Among equal magnitudes the first tensor wins.

    Args:
        floors: smallest number for each tensor, in [0, numel].

    Raises:
        ValueError: `keep` is outside [0, numel of all], or the floors need more than `keep`.
        Diverged: a value is Inf or NaN.
    """
    _check(keep, sum(weight.numel() for weight in weights))
    if sum(floors) > keep:
        raise ValueError(f"the floors alone keep {sum(floors)} weights, more than {keep}")
    if sum(floors) == keep:
        return list(floors)
    dtype = reduce(torch.promote_types, (weight.dtype for weight in weights))
    flats = [weight.detach().flatten() for weight in weights]
    least = torch.tensor(list(floors)).unsqueeze(1)
    # Row by row: how many elements of a tensor lie in this bin or above it.
    from_top = torch.stack([_histogram(flat, dtype).flip(0).cumsum(0).cpu() for flat in flats])
    kept = torch.maximum(from_top, least)  # if the threshold were the lower end of this bin
    place = int((kept.sum(0) < keep).sum())  # bins from the top that do not suffice
    counts = kept[:, place - 1].tolist() if place else list(floors)
    above = from_top[:, place - 1].tolist() if place else [0] * len(flats)
    # What the floors already hold of the boundary bin are its largest: they compete no more.
    free = [
        _magnitudes_in(flat, dtype, _BINS - 1 - place).sort(descending=True).values[n - a :].cpu()
        for flat, n, a in zip(flats, counts, above, strict=True)
    ]
    order = torch.cat(free).sort(descending=True, stable=True).indices[: keep - sum(counts)]
    owner = torch.repeat_interleave(torch.tensor([len(values) for values in free]))
    extra = torch.bincount(owner[order], minlength=len(flats)).tolist()
    return [n + more for n, more in zip(counts, extra, strict=True)]


def _check(keep: int, total: int) -> None:
    if not 0 <= keep <= total:
        raise ValueError(f"cannot keep {keep} of {total} weights")


def _check_finite(weight: Tensor) -> None:
    if not bool(weight.isfinite().all()):
        raise Diverged("weights are Inf or NaN: the training before the pruning diverged")


def _pieces(flat: Tensor) -> tuple[Tensor, ...]:
    return torch.split(flat, _PIECE)


def _magnitude(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """|piece| as an integer: the bits of a float without its sign order like its magnitude."""
    bits = piece.to(dtype).view(_BITS[dtype.itemsize])
    return bits & torch.iinfo(bits.dtype).max


def _upper(flat: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Piece by piece: the magnitudes, and the bins that they fall into."""
    shift = 8 * dtype.itemsize - 16
    for piece in _pieces(flat):
        magnitude = _magnitude(piece, dtype)
        yield magnitude, magnitude >> shift


def _histogram(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """How many magnitudes fall into each bin: int64 [_BINS]. Raises Diverged on Inf and NaN."""
    counts = torch.zeros(_BINS, dtype=torch.int64, device=flat.device)
    for _, bins in _upper(flat, dtype):
        counts += torch.bincount(bins, minlength=_BINS)
    infinite = next(bins for _, bins in _upper(torch.tensor([torch.inf]), dtype))
    if counts[int(infinite) :].any():
        raise Diverged("weights are Inf or NaN: the training before the pruning diverged")
    return counts


def _boundary(histogram: Tensor, keep: int) -> tuple[int, int]:
    """The bin that holds the keep-th largest, and how many elements lie in the bins above it."""
    from_top = histogram.flip(0).cumsum(0)
    place = int((from_top < keep).sum())
    return int(from_top[place - 1]) if place else 0, _BINS - 1 - place


def _magnitudes_in(flat: Tensor, dtype: torch.dtype, bin_: int) -> Tensor:
    """The magnitudes of the elements that fall into a bin, in the order of their index."""
    return torch.cat([magnitude[bins == bin_] for magnitude, bins in _upper(flat, dtype)])
