"""The size of a model in the format of the published figures, for comparison with them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.artifact.tensors import SCALE, WIDTH, multiplied
from trainer.compress.codebooks import codebook_of
from trainer.compress.coding import han, huffman

_FLOAT_BITS = 32  # of other values, of scales, of values of codebooks


@dataclass(frozen=True)
class PublishedSize:
    """Bytes in the format of Deep Compression (Han, Mao & Dally, ICLR 2016, arXiv:1510.00149)."""

    plain: int  # gaps, indices of fixed length or 32-bit values, codebooks: the columns P and P+Q
    coded: int  # with Huffman codes for gaps and indices: P+Q+H; code tables included


def published_size(weights: Mapping[str, Tensor], parameters: Collection[str]) -> PublishedSize:
    """The size of a model in that format, with gaps of 8 bits in convolutions and 5 elsewhere.

    As published, values that are neither pruned nor shared take 32 bits. Quantized values take
    their own bits; their scales are added. Gaps and codebooks are used only for parameters that
    they make smaller.

    Args:
        weights: a state_dict.
        parameters: names of the parameters to count; of tied ones, only the first.
    """
    plain = coded = 0.0
    for name in parameters:
        tensor, bits = weights[name], _FLOAT_BITS
        scale = weights.get(name + SCALE)
        if scale is not None:  # the same integer with different scales is one value
            tensor = (tensor / multiplied(torch.ones_like(tensor), scale)).round()
            bits = int(weights[name + WIDTH])
            plain += scale.numel() * _FLOAT_BITS / 8
            coded += scale.numel() * _FLOAT_BITS / 8
        found = _sizes(tensor, bits)
        plain += found[0]
        coded += found[1]
    return PublishedSize(round(plain), round(coded))


def _sizes(tensor: Tensor, bits: int) -> tuple[float, float]:
    """Bytes of one parameter without and with Huffman codes, with `bits` for each value."""
    max_size = tensor.numel() * bits / 8
    sparse = int(tensor.count_nonzero()) < tensor.numel()
    book = codebook_of(tensor) if tensor.ndim > 1 else None
    if not max_size or tensor.ndim < 2 or (book is None and not sparse):
        return max_size, max_size
    gap_bits = han.CONV_BITS if tensor.ndim > 2 else han.FC_BITS
    levels = (tensor != 0).int() if book is None else book.codes
    flat = levels.flatten().numpy().astype(np.uint16)
    if book is None:
        entries = len(han.entries(flat, gap_bits)[0])
        size = min(max_size, entries * (gap_bits + bits) / 8)
        return size, size
    clusters = len(book.values)
    if sparse:
        sizes = han.sizes(flat, clusters, gap_bits)
        return min(max_size, sizes.shared), min(max_size, sizes.coded)
    codebook = clusters * _FLOAT_BITS / 8
    index_bits = max(1, (clusters - 1).bit_length())
    indices = huffman.encode(flat - 1, clusters)
    return (
        min(max_size, flat.size * index_bits / 8 + codebook),
        min(max_size, len(indices) + codebook),
    )
