"""Entropy coders for pruned and shared layers: integer tensors in, bytes out, and back.

docs/artifact.md, "Coded layers", specifies each bit-stream.
"""

from trainer.compress.coding.budget import Budget
from trainer.compress.coding.coders import Coder
from trainer.compress.coding.errors import CorruptError
from trainer.compress.coding.floats import decode_floats, encode_floats
from trainer.compress.coding.layer import MAX_CLUSTERS, decode_layer, encode_layer, max_positions

__all__ = [
    "MAX_CLUSTERS",
    "Budget",
    "Coder",
    "CorruptError",
    "decode_floats",
    "decode_layer",
    "encode_floats",
    "encode_layer",
    "max_positions",
]
