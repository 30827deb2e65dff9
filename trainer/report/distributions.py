"""Histograms of the weights before and after sharing, for the charts of report.html."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trainer.compress.codebooks import codebook_of

_BINS = 80

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Distribution:
    """The weights of one shared tensor. Zeros are left out, before and after sharing."""

    name: str
    edges: Floats  # [bins + 1], of the histogram before sharing
    counts: Ints  # [bins], weights in each bin before sharing
    values: Floats  # [k], the codebook, ascending
    sizes: Ints  # [k], weights with each value of the codebook


def distributions(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[Distribution]:
    """Compute the distribution of each tensor that has a codebook after sharing.

    Args:
        before, after: the weights of the same model by name, before and after sharing.

    Returns:
        One distribution for each such tensor, sorted by name.
    """
    found = []
    for name, shared in sorted(after.items()):
        book = codebook_of(shared) if shared.ndim > 1 and shared.is_floating_point() else None
        if book is None or not len(book.values):
            continue
        values = book.values.double().numpy()
        sizes = np.bincount(book.codes.flatten().numpy(), minlength=len(values) + 1)[1:]
        kept = before[name][before[name] != 0].double().numpy()
        kept = kept[np.isfinite(kept)]
        extent = np.concatenate((kept, values))
        counts, edges = np.histogram(kept, _BINS, (extent.min(), extent.max()))
        found.append(Distribution(name, edges, counts, values, sizes))
    return found
