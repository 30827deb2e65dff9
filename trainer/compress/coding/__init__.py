"""Entropy coding: matrices of levels, and plain numbers, as few bytes. NumPy in, bytes out."""

from trainer.compress.coding.errors import CorruptError
from trainer.compress.coding.layers import CODERS, decode_layer, encode_layer
from trainer.compress.coding.numbers import decode_numbers, encode_numbers

__all__ = [
    "CODERS",
    "CorruptError",
    "decode_layer",
    "decode_numbers",
    "encode_layer",
    "encode_numbers",
]
