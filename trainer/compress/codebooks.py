"""One-dimensional k-means: few values that stand for many. Pure functions on sorted values.

Sorted values make k-means cheap: every cluster is an interval, its sum a difference of two prefix
sums, so that an iteration costs k binary searches however many values there are.
"""

import heapq
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.compress.jit import jit
from trainer.errors import Diverged

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

MAX_CLUSTERS = (1 << 16) - 1  # of a tensor: an index has two bytes, and index 0 means zero

_ITERATIONS = 300
_GROUPS = 1 << 14  # points that the exact algorithm takes; more values are grouped first
_TABLE = 1 << 26  # clusters times points, for which it keeps 4 bytes each


class Codebook(NamedTuple):
    """A tensor as indices into a list of values: `values[codes - 1]` where `codes` is not zero."""

    values: Tensor  # [k], ascending, none of them zero
    codes: Tensor  # int32, in the shape of the tensor; 0 stands for zero


def linear(values: Floats, k: int) -> Floats:
    """Evenly spaced between the extremes: large weights, few but important, get their own values.

    Han, Mao & Dally, Deep Compression, ICLR 2016, arXiv:1510.00149, section 3.2, as the next two.
    """
    return np.linspace(values[0], values[-1], k)


def density(values: Floats, k: int) -> Floats:
    """Evenly spaced in rank: each value stands for as many weights."""
    ranks: Ints = ((np.arange(k) + 0.5) * len(values) / k).astype(np.int64)
    chosen: Floats = values[ranks]
    return chosen


def random(values: Floats, k: int) -> Floats:
    """Drawn from the values (Forgy); the draw is the same each time."""
    return values[np.sort(np.random.default_rng(0).choice(len(values), k, replace=False))]


def exact(values: Floats, k: int) -> Floats:
    """The means of the clusters of least squared error, found by dynamic programming.

    Optimal for up to 2^14 values. More are put into 2^14 groups of neighbours of equal size, and
    the clusters of the groups are optimal. Above 4096 clusters the groups become fewer, so that
    memory stays below 256 MiB, and from 8192 on each group is a cluster. Wang & Song,
    Ckmeans.1d.dp, The R Journal 2011, with the divide and conquer of Gronlund et al. 2017,
    arXiv:1701.07204: O(k n log n).
    """
    groups = min(len(values), max(k, min(_GROUPS, _TABLE // k)))
    edges = np.linspace(0, len(values), groups + 1).astype(np.int64)
    if groups > k:
        sums = _prefix(values)[edges]
        squares = _prefix(values**2)[edges]
        edges = edges[_partition(edges.astype(np.float64), sums, squares, k)]
    means: Floats = np.add.reduceat(values, edges[:-1]) / np.diff(edges)
    return means


INITS: dict[str, Callable[[Floats, int], Floats]] = {
    "linear": linear,
    "density": density,
    "random": random,
    "exact": exact,
}


def cluster(weights: Tensor, k: int, init: str = "linear", rate: float = 0.0) -> Codebook:
    """At most `k` values that stand for the non-zero elements of `weights`, by Lloyd's algorithm.

    Args:
        weights: of any shape and floating type, finite; what is zero stays zero and has no say.
        k: number of clusters, 1 to 65535. Fewer distinct values than that are taken as they are.
        init: where Lloyd's algorithm begins: linear, density, random or exact. Where that leaves
            clusters without values, they are moved to where the error is largest, and the result
            is compared with that of density: the better of both is taken.
        rate: what a bit of the index costs, in variances of the values. Above 0 the assignment
            minimises error + rate * bits, with -log2 of a cluster's frequency as its bits
            (entropy-constrained vector quantization: Chou, Lookabaugh & Gray, 1989), so that few
            clusters are frequent, and rare ones may vanish.

    Returns:
        Values in the type and on the device of `weights`; none if all weights are zero.

    Raises:
        ValueError: `k` is out of range.
        Diverged: a value is Inf or NaN.
    """
    if not 1 <= k <= MAX_CLUSTERS:
        raise ValueError(f"{k} clusters: there must be 1 to {MAX_CLUSTERS}")
    flat = weights.detach().flatten()
    there = flat.nonzero().squeeze(1)
    survivors = flat[there]
    ordered = np.sort(survivors.double().cpu().numpy())
    if len(ordered) and not (math.isfinite(ordered[0]) and math.isfinite(ordered[-1])):
        raise Diverged("weights are Inf or NaN: the training before the sharing diverged")
    codes = torch.zeros_like(flat, dtype=torch.int32)
    centroids = _distinct(ordered, k)
    borders = (centroids[1:] + centroids[:-1]) / 2
    if len(centroids) > k:
        centroids, borders = _best(ordered, k, init, rate * float(ordered.var()))
    values = torch.from_numpy(centroids).to(weights.device, weights.dtype)
    codes[there] = 1 + torch.bucketize(
        survivors.double(), torch.from_numpy(borders).to(weights.device), out_int32=True
    )
    return Codebook(values, codes.view(weights.shape))


def codebook_of(
    weights: Tensor, max_values: int = MAX_CLUSTERS, any_repeat: bool = False
) -> Codebook | None:
    """The codebook of a tensor that has few distinct values already; None where it has many.

    Args:
        max_values, any_repeat: see `distinct_values`.
    """
    values = distinct_values(weights, max_values, any_repeat)
    if values is None:
        return None
    flat = weights.detach().flatten()
    there = flat != 0
    codes = torch.zeros_like(flat, dtype=torch.int32)
    codes[there] = 1 + torch.searchsorted(values, flat[there], out_int32=True)
    return Codebook(values, codes.view(weights.shape))


def distinct_values(
    weights: Tensor, max_values: int = MAX_CLUSTERS, any_repeat: bool = False
) -> Tensor | None:
    """The distinct values of a tensor but zero, ascending, where they are few; else None.

    Few is at most `max_values`, and at most half as many as there are elements other than zero.
    NaN is no value.

    Args:
        any_repeat: more than half as many are few as well if they repeat at all: a sparse layer may
            have 60 survivors in 32 clusters. Floats are equal by chance, too: if random ones of
            the type repeat m times on average, more than 16 (m + sqrt(m)) repetitions are asked.
    """
    flat = weights.detach().flatten()
    survivors = flat[flat != 0]
    number = len(survivors)
    enough = max(1, number // 2)
    if any_repeat:
        chance = number**2 / 2 * torch.finfo(weights.dtype).eps / 2
        enough = max(enough, number - 1 - int(16 * (chance + math.sqrt(chance))))
    max_values = min(max_values, enough)
    if survivors[: 4 * max_values].unique().numel() > max_values:  # without a look at the rest
        return None
    values = survivors.unique()
    return None if len(values) > max_values or values.isnan().any() else values


def _distinct(ordered: Floats, k: int) -> Floats:
    """The first k + 1 distinct values at most."""
    changes = np.flatnonzero(np.diff(ordered))[:k] + 1
    return ordered[np.concatenate(([0], changes))] if len(ordered) else ordered


def _best(ordered: Floats, k: int, init: str, price: float) -> tuple[Floats, Floats]:
    """The centroids that Lloyd's algorithm finds from `init`, and the borders between their cells.

    If it had to move clusters without values, also the search from density is made: `init` did not
    suit the values, and a local optimum much worse than necessary is likely.
    """
    centroids, borders, moved = _lloyd(ordered, INITS[init](ordered, k), price)
    if moved and init != "density":
        other = _lloyd(ordered, density(ordered, k), price)[:2]
        if _cost(ordered, *other, price) < _cost(ordered, centroids, borders, price):
            return other
    return centroids, borders


def _cost(ordered: Floats, centroids: Floats, borders: Floats, price: float) -> float:
    """Squared error plus the price of all indices, by the frequencies of the clusters."""
    sizes = np.diff(np.searchsorted(ordered, borders, "right"), prepend=0, append=len(ordered))
    error = float(((ordered - np.repeat(centroids, sizes)) ** 2).sum())
    used = sizes[sizes > 0]
    return error - price * float((used * np.log2(used / len(ordered))).sum())


def _lloyd(ordered: Floats, centroids: Floats, price: float) -> tuple[Floats, Floats, bool]:
    """Move centroids to the means of their cells until nothing changes.

    A centroid whose cell has no values is moved into the cell of the largest squared error. With a
    price, that happens before the first step only: later, a rare cluster may vanish because its
    index is expensive.

    Args:
        ordered: sorted values [n].
        centroids: ascending [k].
        price: of a bit, in squared units of the values.

    Returns:
        The centroids and the borders between their cells, both ascending, and whether a centroid
        was moved.
    """
    moved = False
    sums = _prefix(ordered)
    still = 1e-9 * max(abs(ordered[0]), abs(ordered[-1]))
    offsets = np.zeros(len(centroids))
    for iteration in range(_ITERATIONS):
        used, borders = _cells(centroids, offsets)
        ends = np.concatenate(([0], np.searchsorted(ordered, borders, "right"), [len(ordered)]))
        there = np.diff(ends) > 0
        edges = np.concatenate((ends[:-1][there], [len(ordered)]))
        unused = len(centroids) - int(there.sum())
        reseed = unused > 0 and (iteration == 0 or not price)
        if reseed:
            edges, moved = _split(ordered, edges, unused), True
        sizes = np.diff(edges)
        means = np.diff(sums[edges]) / sizes
        before = centroids[used][there]
        centroids, offsets = means, -price * np.log2(sizes / len(ordered))
        if not reseed and len(means) == len(used) and np.abs(means - before).max() <= still:
            break
    used, borders = _cells(centroids, offsets)
    return centroids[used], borders, moved


def _split(ordered: Floats, edges: Ints, number: int) -> Ints:
    """Cut cells until there are `number` more: each time the one of the largest squared error.

    Args:
        ordered: sorted values [n].
        edges: where the cells begin, and n: [cells + 1].

    Returns:
        The new edges; fewer than asked for where every cell holds one value.
    """
    starts, sizes = edges[:-1], np.diff(edges)
    means = np.add.reduceat(ordered, starts) / sizes
    errors = np.add.reduceat((ordered - np.repeat(means, sizes)) ** 2, starts)
    heap = list(zip((-errors).tolist(), starts.tolist(), edges[1:].tolist(), strict=True))
    heapq.heapify(heap)
    cuts: list[int] = []
    while heap and len(cuts) < number:
        _, start, end = heapq.heappop(heap)
        cell = ordered[start:end]
        if cell[0] == cell[-1]:
            continue
        # The mean lies between both ends, but may round to the last value.
        last = int(np.searchsorted(cell, cell[-1]))
        cut = start + min(int(np.searchsorted(cell, cell.mean(), "right")), last)
        cuts.append(cut)
        for half in ((start, cut), (cut, end)):
            values = ordered[slice(*half)]
            heapq.heappush(heap, (-float(((values - values.mean()) ** 2).sum()), *half))
    return np.sort(np.concatenate((edges, np.array(cuts, np.int64))))


def _cells(centroids: Floats, offsets: Floats) -> tuple[Ints, Floats]:
    """Which centroids win somewhere, and the borders between their cells.

    Centroid i wins at w where (w - c_i)^2 + offset_i is least: without w^2 those are straight
    lines, and the cells are the pieces of their lower envelope.
    """
    used: list[int] = []
    borders: list[float] = []
    for i in range(len(centroids)):
        while used:
            j = used[-1]
            gap = centroids[i] - centroids[j]
            if gap == 0:
                border = -math.inf if offsets[i] < offsets[j] else math.inf
            else:
                border = (centroids[i] + centroids[j]) / 2 + (offsets[i] - offsets[j]) / (2 * gap)
            if border == math.inf or not borders or border > borders[-1]:
                break
            used.pop()
            borders.pop()
        if not used:
            used.append(i)
        elif border == -math.inf:
            used[-1] = i
        elif border != math.inf:
            used.append(i)
            borders.append(border)
    return np.array(used, dtype=np.int64), np.array(borders, dtype=np.float64)


def _prefix(values: Floats) -> Floats:
    return np.concatenate(([0.0], np.cumsum(values)))


@jit
def _partition(counts: Floats, sums: Floats, squares: Floats, k: int) -> Ints:
    """Edges [k + 1] of the partition of n points into k runs with the least squared error.

    Args:
        counts, sums, squares: prefix sums [n + 1] of weights, values and squared values.
    """
    n = len(counts) - 1
    cost = np.empty(n + 1)
    for i in range(1, n + 1):
        cost[i] = squares[i] - sums[i] * sums[i] / counts[i]
    cost[0] = 0.0
    first = np.zeros((k, n + 1), dtype=np.int32)  # where run j, the last over i points, begins
    fresh = np.empty(n + 1)
    stack = np.empty((128, 4), dtype=np.int64)
    for j in range(1, k):
        fresh[:] = np.inf
        stack[0] = j + 1, n, j, n - 1
        depth = 1
        while depth:
            depth -= 1
            low, high, left, right = stack[depth]
            if low > high:
                continue
            i = (low + high) // 2
            best = left
            for m in range(left, min(right, i - 1) + 1):
                weight, total = counts[i] - counts[m], sums[i] - sums[m]
                error = cost[m] + squares[i] - squares[m] - total * total / weight
                if error < fresh[i]:
                    fresh[i] = error
                    best = m
            first[j, i] = best
            stack[depth] = low, i - 1, left, best
            stack[depth + 1] = i + 1, high, best, right
            depth += 2
        cost[:] = fresh
    edges = np.empty(k + 1, dtype=np.int64)
    edges[k] = n
    for j in range(k - 1, 0, -1):
        edges[j] = first[j, edges[j + 1]]
    edges[0] = 0
    return edges
