"""What a model would take in the format of the published figures, so that they can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from trainer.compress.codebooks import codebook_of
from trainer.compress.coding.huffman import fixed_bits, huffman_bits, to_gaps


@dataclass(frozen=True)
class PublishedSize:
    """Bytes in the format of Deep Compression (Han, Mao & Dally, ICLR 2016, arXiv:1510.00149)."""

    plain: int  # gaps, indices of fixed length or 32-bit values, codebooks: the columns P and P+Q
    coded: int  # with Huffman codes for gaps and indices: P+Q+H; code tables not counted


def published_size(weights: Mapping[str, Tensor]) -> PublishedSize:
    """Gaps of 8 bits in convolutions and 5 elsewhere; what is not pruned or shared takes 32 bits a
    value, as published.
    """
    plain = coded = 0.0
    for tensor in weights.values():
        if not tensor.is_floating_point():
            continue
        nonzero = int(tensor.count_nonzero())
        book = codebook_of(tensor)
        if tensor.ndim < 2 or (nonzero == tensor.numel() and book is None):
            plain += 4 * tensor.numel()
            coded += 4 * tensor.numel()
            continue
        gap_bits = 8 if tensor.ndim == 4 else 5
        levels = (tensor != 0).int() if book is None else book.codes
        gaps = to_gaps(levels.reshape(tensor.shape[0], -1).numpy().astype(np.uint16), gap_bits)
        if book is None:
            plain += len(gaps.values) * (gap_bits + 32) / 8
            coded += len(gaps.values) * (gap_bits + 32) / 8
        else:
            plain += fixed_bits(gaps, gap_bits, len(book.values)) / 8 + 4 * len(book.values)
            coded += huffman_bits(gaps) / 8 + 4 * len(book.values)
    return PublishedSize(round(plain), round(coded))
