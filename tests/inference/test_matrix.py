"""Compressed matrices: entries, and decoding to the same weight."""

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.inference.codes import to_codes
from trainer.inference.matrix import compress


def random_weight(rows: int, columns: int, values: int, density: float = 0.2) -> Tensor:
    """Few distinct values, or as many as entries where `values` is 0."""
    draw = torch.Generator().manual_seed(0)
    kept = torch.rand(rows, columns, generator=draw) < density
    weight = torch.randn(rows, columns, generator=draw)
    if values:
        book = torch.randn(values, generator=draw)
        weight = book[torch.randint(values, (rows, columns), generator=draw)]
    return weight * kept


@pytest.mark.parametrize("values", [1, 2, 15, 16, 17, 255, 0])
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("parts", [1, 3])
def test_back_again(values: int, order, parts: int) -> None:
    weight = random_weight(300, 700, values, 0.5 if values == 255 else 0.2)
    matrix = compress(weight, order, parts)
    assert torch.equal(matrix.dense(), weight)
    assert matrix.nonzero == int(weight.count_nonzero())
    assert matrix.bits == (max(1, (values - 1).bit_length()) if values else 0)
    assert (len(matrix.starts) - 1) % parts == 0


@pytest.mark.parametrize("rows", [5, 128, 700])
@pytest.mark.parametrize(("values", "bits"), [(1, 4), (15, 4), (16, 5), (31, 5)])
def test_codes_and_back_again(rows: int, values: int, bits: int) -> None:
    weight = random_weight(rows, 70, values, 0.6)
    matrix = to_codes(weight)
    assert matrix is not None
    assert torch.equal(matrix.dense(), weight)
    assert matrix.bits == bits
    assert matrix.words.nbytes >= weight.numel() * bits / 8


def test_codes_of_too_many_values() -> None:
    assert to_codes(random_weight(90, 90, 32)) is None
    assert to_codes(random_weight(90, 90, 0)) is None


def test_two_bytes_a_weight() -> None:
    """Position and code of 4 bits together take 16 bits, for 4096 rows."""
    matrix = compress(random_weight(4096, 64, 15, 0.1), "columns")
    assert matrix.entries.dtype == np.uint16
    assert len(matrix.starts) == 2
    line = matrix.entries[matrix.pointers[0, 5] : matrix.pointers[0, 6]]
    weight = matrix.dense()[:, 5]
    positions = weight.nonzero().flatten().numpy()
    assert np.array_equal(line >> 4, positions)
    assert np.array_equal(matrix.table[line & 15], weight[positions].numpy())


def test_an_empty_one() -> None:
    matrix = compress(torch.zeros(5, 7), "columns")
    assert matrix.nonzero == 0
    assert torch.equal(matrix.dense(), torch.zeros(5, 7))


def test_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        compress(torch.full((3, 3), float("nan")), "rows")
