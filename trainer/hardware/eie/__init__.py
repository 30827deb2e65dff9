"""EIE, the accelerator for pruned networks with shared weights: what it computes and how fast.

    matrix = encode(shared.codes, EieSettings())
    sums = product(matrix, shared.codebook, activations)
    cost = simulate(matrix, activations, EieSettings())

Han et al., EIE: Efficient Inference Engine on Compressed Deep Neural Network, ISCA 2016,
arXiv:1602.01528.
"""

from trainer.hardware.eie.cycles import EieCycles, layer_cycles, simulate
from trainer.hardware.eie.encoding import EncodedMatrix, decode, encode
from trainer.hardware.eie.layers import (
    SharedMatrix,
    artifact_matrices,
    random_activations,
    random_codes,
    shared_matrix,
)
from trainer.hardware.eie.power import square_millimetres, watts
from trainer.hardware.eie.product import FixedPoint, Formats, fixed_point_product, product
from trainer.hardware.eie.settings import EieSettings

__all__ = [
    "EieCycles",
    "EieSettings",
    "EncodedMatrix",
    "FixedPoint",
    "Formats",
    "SharedMatrix",
    "artifact_matrices",
    "decode",
    "encode",
    "fixed_point_product",
    "layer_cycles",
    "product",
    "random_activations",
    "random_codes",
    "shared_matrix",
    "simulate",
    "square_millimetres",
    "watts",
]
