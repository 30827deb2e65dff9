"""Data sets of the library `datasets` (Hugging Face). Needs the extra `huggingface`."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from trainer.data.datasets import Collate, DatasetSplit, held_out
from trainer.data.split import Split, Splits
from trainer.errors import first_line

Transform = Callable[[Mapping[str, Any]], tuple[Any, Any]]
"""A function from a row (values by column) to (input, target)."""


class Rows(Dataset[tuple[Any, Any]]):
    """The rows of a table of `datasets` as (input, target) pairs.

    Args:
        table: A `datasets.Dataset`.
        inputs: A column, or several, which the model gets by keyword.
        target: A column.
        transform: Converts a row to a pair; used instead of `inputs` and `target`.
    """

    def __init__(
        self,
        table: Any,
        inputs: str | Sequence[str] | None,
        target: str | None,
        transform: Transform | None,
    ) -> None:
        self._table = table
        self._inputs = inputs
        self._target = target
        self._transform = transform

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._table[int(index)]
        if self._transform is not None:
            return self._transform(row)
        assert self._inputs is not None
        if isinstance(self._inputs, str):
            return _tensor(row[self._inputs]), _tensor(row[self._target])
        return {name: _tensor(row[name]) for name in self._inputs}, _tensor(row[self._target])


def huggingface(
    path: str,
    inputs: str | Sequence[str] | None = None,
    target: str | None = None,
    transform: Transform | None = None,
    name: str | None = None,
    data_files: Any = None,
    train: str = "train",
    validation: str | None = None,
    test: str | None = None,
    hold_out: float = 0.1,
    collate: Collate | None = None,
    loader_workers: int | None = None,
    seed: int = 0,
) -> Splits:
    """Splits of a data set of the library `datasets`.

    Args:
        path: A folder that `save_to_disk` wrote, or the first argument of `datasets.load_dataset`:
            a name of the hub, a folder, or a format ("csv", "json", "parquet", "text").
        inputs: The column of the inputs, numbers or lists of numbers; or several, which the model
            gets as keyword arguments.
        target: The column of the targets.
        transform: Converts a row, a mapping by column, to (input, target); used instead of `inputs`
            and `target` for images, texts and other columns that are not numbers.
        name: Configuration of the data set (`load_dataset`'s second argument).
        data_files: For a format: files, or a mapping from split to files.
        train: Name of the split for training.
        validation: Likewise for validation; None: "validation" if there is one, or else a part of
            the training rows is held out.
        test: Likewise for testing, "test".
        hold_out: Fraction of the training rows in each part that is held out, by a fixed
            permutation.
        collate: Converts a list of (input, target) pairs to a batch, such as `trainer.data.Pad` for
            lists of different lengths; None: they are stacked.
        loader_workers: Processes per worker and split that read rows; 0: the worker reads
            them; None: as many as there are CPUs that training does not use, up to 8.
        seed: Seeds the random numbers that `transform` draws.

    Raises:
        ValueError: The data set cannot be loaded, or a split or column is missing.
    """
    if (transform is None) != (inputs is not None and target is not None):
        raise ValueError("data: give the columns inputs and target, or a transform")
    tables = _load(path, name, data_files)
    named = {"validation": validation, "test": test}
    for part, default in (("validation", "validation"), ("test", "test")):
        if named[part] is None and default in tables and default != train:
            named[part] = default
    for split in (train, *named.values()):
        if split is not None and split not in tables:
            raise ValueError(
                f"data: {path} has no split {split!r}; it has {', '.join(map(str, tables))}"
            )
    columns = tables[train].column_names
    listed = [] if transform else [*([inputs] if isinstance(inputs, str) else inputs or ()), target]
    for column in listed:
        if column not in columns:
            raise ValueError(f"data: {path} has no column {column!r}; it has {', '.join(columns)}")

    def rows(split: str) -> Dataset[Any]:
        return Rows(tables[split], inputs, target, transform)

    absent = [part for part, split in named.items() if split is None]
    *held, rest = held_out(rows(train), hold_out, len(absent)) if absent else [rows(train)]
    parts = {"train": rest} | dict(zip(absent, held, strict=True))
    parts |= {part: rows(split) for part, split in named.items() if split is not None}
    splits: dict[str, Split] = {
        part: DatasetSplit(samples, seed, loader_workers, collate=collate)
        for part, samples in parts.items()
    }
    return Splits(**splits)


def _load(path: str, name: str | None, data_files: Any) -> Mapping[str, Any]:
    """The tables of a data set by split."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            "data=huggingface needs the library datasets: run pip install '.[huggingface]' in the "
            "checkout"
        ) from error
    folder = Path(path).expanduser()
    saved = any((folder / file).exists() for file in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(path, name, data_files=data_files)
    except Exception as error:  # the library raises many kinds
        raise ValueError(f"data: {path} cannot be loaded: {first_line(error)}") from error
    return found if isinstance(found, Mapping) else {"train": found}


def _tensor(value: Any) -> Any:
    """Numbers and lists of numbers as a tensor; anything else unchanged."""
    try:
        return value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value
