"""All exhibits, in the order of the lecture."""

from collections.abc import Mapping

from trainer.lecture.compression import DEEP_COMPRESSION, DISTRIBUTIONS, HUFFMAN, LSTM_EXHIBIT
from trainer.lecture.exhibit import Exhibit
from trainer.lecture.hardware import EIE, ENERGY, TPU
from trainer.lecture.pruning import INTERFERENCE, PRUNING, SENSITIVITY, SIZE
from trainer.lecture.training import PARALLEL, PRECISION, RING

EXHIBITS: Mapping[str, Exhibit] = {
    exhibit.name: exhibit
    for exhibit in (
        PRUNING,
        SENSITIVITY,
        LSTM_EXHIBIT,
        DISTRIBUTIONS,
        SIZE,
        HUFFMAN,
        DEEP_COMPRESSION,
        PRECISION,
        RING,
        PARALLEL,
        INTERFERENCE,
        ENERGY,
        TPU,
        EIE,
    )
}
"""By name."""
