"""Tables in CSV and Parquet files: numbers are standardized, categories become one-hot vectors."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.datasets import SPLIT_SEED, held_out_size
from trainer.data.order import permutation
from trainer.data.split import Splits, TensorSplit

_MISSING = frozenset(("", "na", "n/a", "nan", "null", "none", "?"))  # in any case of letters
_MAX_CATEGORIES = 1000

Column = list[str | None]  # None: missing


def table(
    path: str,
    target: str,
    validation: str | None = None,
    test: str | None = None,
    hold_out: float = 0.1,
    features: Sequence[str] | None = None,
    categorical: Sequence[str] = (),
    regression: bool = False,
    missing: str = "error",
    separator: str = ",",
) -> Splits:
    """Splits of the rows of a table. Inputs float32 [n, width].

    A column in which all training values are numbers is standardized: from each value the mean of
    the training rows is subtracted, and it is divided by their standard deviation. Any other column
    holds categories, one input for each that the training rows have; a category that only other
    rows have is zero in all of them. Inputs are in the order of `features`.

    Args:
        path: A .csv, .tsv or .parquet file with the names of columns; Parquet needs pyarrow (the
            extra `parquet`).
        target: Column to predict: classes, int64 [n], or numbers, float32 [n]. Classes are whole
            numbers from 0, or else numbered in the order of their sorted names.
        validation: Another such file; None: a part of the rows is held out.
        test: Likewise.
        hold_out: Fraction of the rows in each part that is held out, by a fixed permutation.
        features: Columns to predict from; None: all but the target.
        categorical: Columns that hold categories although they are numbers.
        regression: Whether the target is a number instead of a class.
        missing: How to treat missing features (empty, NA, NaN, null, None, ?): "error", or "mean",
            which uses the mean of the training rows, or zeros for a category. A missing
            target is always an error.
        separator: Between two columns of a .csv file.

    Raises:
        ValueError: A file, column or value cannot be used; the message names file, row and column.
    """
    if missing not in ("error", "mean"):
        raise ValueError(f"data.missing={missing}: it must be error or mean")
    files = {"train": path, "validation": validation, "test": test}
    tables = {
        part: _Table(Path(file).expanduser(), separator) for part, file in files.items() if file
    }
    whole = tables["train"]
    names = [name for name in whole.columns if name != target] if features is None else features
    if target in names:
        raise ValueError(f"data.features: {target!r} is data.target, which is to be predicted")
    for name in categorical:
        if name not in names:
            raise ValueError(f"data.categorical: {name!r} is not one of the features")
    absent = [part for part in ("validation", "test") if part not in tables]
    size = held_out_size(len(whole), hold_out, len(absent)) if absent else 0
    order = permutation(len(whole), SPLIT_SEED, 0)
    *held_out, rest = order.tensor_split([size * (i + 1) for i in range(len(absent))])
    rows = {"train": rest} | dict(zip(absent, held_out, strict=True))

    encoders = [_Encoder(whole, name, rest, name in categorical, missing) for name in names]
    classes = None if regression else _classes(whole, target)
    made = {}
    for part in files:
        source = tables.get(part, whole)
        chosen = rows.get(part, torch.arange(len(source))).sort().values
        inputs = torch.cat([encode(source, chosen) for encode in encoders], 1)
        made[part] = TensorSplit(inputs, _targets(source, target, chosen, classes))
    return Splits(**made)


class _Table:
    """The columns of a file as texts."""

    def __init__(self, path: Path, separator: str) -> None:
        self.path = path
        try:
            match path.suffix:
                case ".csv" | ".tsv":
                    self.columns = _read_csv(path, "\t" if path.suffix == ".tsv" else separator)
                case ".parquet":
                    self.columns = _read_parquet(path)
                case _:
                    raise ValueError("it must be a .csv, .tsv or .parquet file")
        except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
            raise ValueError(f"data: the table {path} cannot be read: {error}") from error
        if not len(self):
            raise ValueError(f"data: the table {path} has no rows")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def column(self, name: str) -> Column:
        if name not in self.columns:
            raise ValueError(
                f"data: {self.path} has no column {name!r}; it has {', '.join(self.columns)}"
            )
        return self.columns[name]

    def where(self, name: str, row: int) -> str:
        return f"data: {self.path}, row {row + 1}, column {name!r}"  # without the line of names


def _read_csv(path: Path, separator: str) -> dict[str, Column]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=separator)
        names = [name.strip() for name in next(lines, [])]
        if len(set(names)) < len(names):
            raise ValueError("two of its columns have the same name")
        columns: list[Column] = [[] for _ in names]
        for line in lines:
            if not line:
                continue
            if len(line) != len(names):
                raise ValueError(
                    f"line {lines.line_num} has {len(line)} values for {len(names)} columns "
                    f"separated by {separator!r}"
                )
            for column, value in zip(columns, line, strict=True):
                text = value.strip()
                column.append(None if text.lower() in _MISSING else text)
    return dict(zip(names, columns, strict=True))


def _read_parquet(path: Path) -> dict[str, Column]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(
            "Parquet needs pyarrow: run pip install '.[parquet]' in the checkout"
        ) from error
    try:
        content = parquet.read_table(path)
    except ArrowException as error:
        raise ValueError(str(error)) from error
    return {
        name: [_text(value) for value in column.to_pylist()]
        for name, column in zip(content.column_names, content.columns, strict=True)
    }


def _text(value: object) -> str | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return str(int(value)) if isinstance(value, bool) else str(value)


class _Encoder:
    """Converts one column to inputs, with statistics or categories of the training rows."""

    def __init__(
        self, whole: _Table, name: str, rows: Tensor, categorical: bool, missing: str
    ) -> None:
        self._name = name
        self._missing = missing
        self._codes: dict[str, int] | None = None
        values = [whole.column(name)[row] for row in rows.tolist()]
        known = [value for value in values if value is not None]
        if not known:
            raise ValueError(
                f"data: column {name!r} has no value in the training rows; leave it out of "
                "data.features"
            )
        if categorical or any(_number(value) is None for value in known):
            found = sorted(set(known))
            if len(found) > _MAX_CATEGORIES:
                raise ValueError(
                    f"data: column {name!r} holds {len(found)} different texts, such as "
                    f"{found[0]!r}; leave it out of data.features, or group them"
                )
            self._codes = {value: code for code, value in enumerate(found)}
            return
        numbers = np.array([_number(value) for value in known])
        self._mean = float(numbers.mean())
        self._std = float(numbers.std()) or 1.0  # a column of equal numbers becomes zeros

    def __call__(self, source: _Table, rows: Tensor) -> Tensor:
        """float32 [rows, width]."""
        column = source.column(self._name)
        width = 1 if self._codes is None else len(self._codes)
        made: NDArray[np.float32] = np.zeros((len(rows), width), dtype=np.float32)
        for position, row in enumerate(rows.tolist()):
            value = column[row]
            if value is None:
                if self._missing == "error":
                    raise ValueError(
                        f"{source.where(self._name, row)}: the value is missing; leave the column "
                        "out of data.features, or set data.missing=mean"
                    )
            elif self._codes is not None:
                if value in self._codes:
                    made[position, self._codes[value]] = 1
            else:
                number = _number(value)
                if number is None:
                    raise ValueError(
                        f"{source.where(self._name, row)}: {value!r} is not a finite number, but "
                        "all training values are"
                    )
                made[position, 0] = (number - self._mean) / self._std
        return torch.from_numpy(made)


def _number(value: str) -> float | None:
    """A text as a finite number; None if it is none."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _classes(whole: _Table, name: str) -> Mapping[str, int]:
    """The number of every class of the training table."""
    found = {value for value in whole.column(name) if value is not None}
    if all(value.isdecimal() for value in found):
        return {value: int(value) for value in found}
    if len(found) > _MAX_CATEGORIES:
        raise ValueError(
            f"data.target={name}: it holds {len(found)} different values; for numbers set "
            "data.regression=true"
        )
    return {value: code for code, value in enumerate(sorted(found))}


def _targets(source: _Table, name: str, rows: Tensor, classes: Mapping[str, int] | None) -> Tensor:
    column = source.column(name)
    targets: list[float] = []
    for row in rows.tolist():
        value = column[row]
        target = None
        if value is not None:
            target = _number(value) if classes is None else classes.get(value)
        if target is None:
            wanted = "a finite number" if classes is None else "a class of the training rows"
            shown = "missing" if value is None else repr(value)
            raise ValueError(f"{source.where(name, row)}: the target is {shown}, not {wanted}")
        targets.append(target)
    return torch.tensor(targets, dtype=torch.float32 if classes is None else torch.int64)
