"""The format of EIE: the paper's two examples, and decoding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trainer.errors import ConfigError
from trainer.hardware.eie import EieSettings, decode, encode

# Figure 2: the weights of element 0 are rows 0, 4, 8 and 12, as pairs of row and column.
ELEMENT_0 = [
    (0, 0), (8, 0), (12, 0), (4, 1), (0, 2), (12, 2), (0, 4), (4, 4), (0, 5), (12, 5), (0, 6),
    (8, 7), (12, 7),
]  # fmt: skip


def test_a_long_gap_gets_a_filler() -> None:
    """Section III-B: the column 0, 0, 1, 2, eighteen zeros, 3."""
    column = np.array([0, 0, 1, 2, *[0] * 18, 3])[:, None]
    memory = encode(column, EieSettings(elements=1)).element(0)
    assert memory.codes.tolist() == [1, 2, 0, 3]
    assert memory.zeros.tolist() == [2, 0, 15, 2]
    assert memory.pointers.tolist() == [0, 4]


def test_a_matrix_on_four_elements() -> None:
    """Figure 3: the memory of element 0 for the 16 x 8 matrix of figure 2."""
    codes = np.zeros((16, 8), np.uint16)
    codes[1::4] = 7  # of another element
    for number, (row, column) in enumerate(ELEMENT_0, 1):
        codes[row, column] = number
    memory = encode(codes, EieSettings(elements=4)).element(0)
    assert memory.codes.tolist() == list(range(1, 14))
    assert memory.zeros.tolist() == [0, 1, 0, 1, 0, 2, 0, 0, 0, 2, 0, 2, 0]
    assert memory.pointers.tolist() == [0, 3, 4, 6, 6, 8, 10, 11, 13]


@given(
    arrays(np.uint16, st.tuples(st.integers(1, 70), st.integers(1, 5)), elements=st.integers(0, 3)),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_decoding_gives_the_matrix_back(codes, elements: int, index_bits: int) -> None:
    settings = EieSettings(elements=elements, index_bits=index_bits)
    matrix = encode(codes, settings)
    assert np.array_equal(decode(matrix), codes)
    assert len(matrix.codes) == np.count_nonzero(codes) + matrix.fillers
    assert matrix.zeros.max(initial=0) < 1 << index_bits


def test_a_codebook_that_is_too_large_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"code_bits=4.* 16 values.* code_bits=5"):
        encode(np.array([[16]]), EieSettings())
    assert encode(np.array([[16]]), EieSettings(code_bits=5)).codes.tolist() == [16]


@pytest.mark.parametrize(
    "settings",
    [
        {"elements": 0},
        {"queue_depth": -1},
        {"index_bits": 9},
        {"code_bits": 17},
        {"clock": float("nan")},
    ],
)
def test_impossible_settings_are_refused(settings) -> None:
    with pytest.raises(ConfigError, match=r"must be (above 0|at most)"):
        EieSettings(**settings)


def test_a_word_must_hold_an_entry() -> None:
    assert EieSettings().entries_per_word == 8
    with pytest.raises(ConfigError, match="word_bits=4"):
        EieSettings(word_bits=4)
