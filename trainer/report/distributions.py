"""The weights of a model before and after sharing, as counts: what the figure of a report shows."""

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
    """One shared tensor; zeros are left out, before and after."""

    name: str
    edges: Floats  # [bins + 1], of the values before
    counts: Ints  # [bins], weights before in each bin
    values: Floats  # [k], the codebook after, ascending
    sizes: Ints  # [k], weights that have each value


def distributions(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[Distribution]:
    """What sharing made of each tensor that has a codebook after it, by name.

    Args:
        before, after: weights by name, of the same model.
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
