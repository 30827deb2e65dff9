"""Data that is passed as Python objects: splits, Datasets, or tensors."""

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from trainer.data.datasets import NO_LOADER, SPLIT_SEED, DatasetSplit, dataset, held_out_size
from trainer.data.order import permutation
from trainer.data.split import Split, Splits, TensorSplit
from trainer.data.streams import Stream, is_stream
from trainer.data.tree import map_tensors

_PARTS = ("train", "validation", "test")
_ACCEPTED = (
    "pass Splits, a Dataset or a list of (input, target) pairs, a pair (inputs, targets) of "
    "tensors, or three of these as (train, validation, test) or as a mapping with these keys; an "
    "IterableDataset must be one of three"
)


def as_splits(data: Any, seed: int = 0, hold_out: float = 0.1) -> Splits:
    """Make `Splits` of the data that users pass to the library.

    Args:
        data: One of

            - `Splits`, which are returned as they are;
            - a map-style Dataset or a list of (input, target) pairs, or a pair (inputs, targets) of
              tensors or NumPy arrays: a fixed permutation holds out parts for validation and test.
              The inputs of a model with several are a tuple (positional) or a mapping (by keyword);
            - three of these, as a sequence (train, validation, test) or a mapping with these keys,
              of which validation and test may be missing or None: they are held out from train;
              each of three may also be a stream, as in `trainer.data.stream`.
        seed: Seeds the random numbers of augmentation in Datasets.
        hold_out: Fraction of train that is held out for each part that is not given.

    Raises:
        ValueError: The data has none of these forms, or is too small to hold out parts.
    """
    if isinstance(data, Splits):
        return data
    parts = _parts(data)
    missing = [name for name in _PARTS[1:] if parts.get(name) is None]
    train = parts["train"]
    if _is_pair(train) and missing:
        whole = TensorSplit(*map(_tensors, train))
        inputs, targets = whole.inputs, whole.targets
        size = held_out_size(len(targets), hold_out, len(missing))
        order = permutation(len(targets), SPLIT_SEED, 0)
        *held, rest = order.tensor_split([size * (i + 1) for i in range(len(missing))])
        parts |= {
            name: TensorSplit(
                map_tensors(itemgetter(indices), inputs), targets[indices], numbers=indices
            )
            for name, indices in zip([*missing, "train"], [*held, rest], strict=True)
        }
    elif missing:
        made = dataset(train, parts.get("validation"), parts.get("test"), hold_out, seed=seed)
        return made
    return Splits(**{name: as_split(name, parts[name], seed) for name in _PARTS})


def _parts(data: Any) -> dict[str, Any]:
    """The data by part; validation and test may be missing."""
    if isinstance(data, Mapping):
        unknown = [str(key) for key in data if key not in _PARTS]
        if unknown or data.get("train") is None:
            problem = f"unknown keys {', '.join(unknown)}" if unknown else "there is no train"
            raise ValueError(f"data: {problem}; {_ACCEPTED}")
        return dict(data)
    if _is_pair(data) or _is_dataset(data):
        return {"train": data}
    if isinstance(data, Sequence) and len(data) == 3:
        return dict(zip(_PARTS, data, strict=True))
    if isinstance(data, list):
        return {"train": data}
    if isinstance(data, DataLoader):
        raise ValueError(f"data {NO_LOADER}")
    raise ValueError(f"data is a {type(data).__name__}: {_ACCEPTED}")


def as_split(name: str, part: Any, seed: int) -> Split:
    """One of three parts as a split. Raises ValueError if it has no form that `as_splits` lists."""
    if isinstance(part, DataLoader):
        raise ValueError(f"data.{name} {NO_LOADER}")
    if _is_pair(part):
        return TensorSplit(*map(_tensors, part))
    if isinstance(part, TensorDataset) and len(part.tensors) == 2:
        return TensorSplit(*part.tensors)
    if hasattr(part, "batches"):
        split: Split = part
        return split
    if is_stream(part):
        return DatasetSplit(Stream(part, seed), seed)
    if _is_dataset(part) or isinstance(part, list):
        return DatasetSplit(part, seed)
    raise ValueError(f"data: {name} is a {type(part).__name__}; {_ACCEPTED}")


def _is_pair(data: Any) -> bool:
    """Whether `data` is (inputs, targets), where inputs may be a tuple or mapping of arrays."""
    if not (isinstance(data, tuple | list) and len(data) == 2):
        return False
    inputs, targets = data
    if isinstance(inputs, Mapping):
        inputs = [*inputs.values()]
    several = inputs if isinstance(inputs, tuple | list) and inputs else [inputs]
    return all(isinstance(x, Tensor | np.ndarray) for x in (*several, targets))


def _is_dataset(data: Any) -> bool:
    named = isinstance(data, Dataset) and not isinstance(data, torch.utils.data.IterableDataset)
    return named or (
        hasattr(data, "__getitem__")
        and hasattr(data, "__len__")
        and not _is_pair(data)
        and not isinstance(data, Sequence | Mapping | Tensor | np.ndarray)
    )


def _tensors(data: Any) -> Any:
    if isinstance(data, Mapping):
        return {key: _tensors(item) for key, item in data.items()}
    if isinstance(data, tuple | list):
        return tuple(map(_tensors, data))
    return torch.from_numpy(data) if isinstance(data, np.ndarray) else data
