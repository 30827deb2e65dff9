"""All exhibits, in the order of the lecture."""

from collections.abc import Mapping

from trainer.lecture.compression import DEEP_COMPRESSION, DISTRIBUTIONS, HUFFMAN, LSTM_EXHIBIT
from trainer.lecture.exhibit import Exhibit
from trainer.lecture.hardware import EIE, ENERGY, TPU
from trainer.lecture.pruning import INTERFERENCE, SENSITIVITY

EXHIBITS: Mapping[str, Exhibit] = {
    exhibit.name: exhibit
    for exhibit in (
        SENSITIVITY,
        LSTM_EXHIBIT,
        DISTRIBUTIONS,
        HUFFMAN,
        DEEP_COMPRESSION,
        INTERFERENCE,
        ENERGY,
        TPU,
        EIE,
    )
}
"""By name."""
