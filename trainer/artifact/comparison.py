"""What a model would take in the format of the published figures, so that they can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.artifact.tensors import SCALE, WIDTH, multiplied
from trainer.compress.codebooks import codebook_of
from trainer.compress.coding import han


@dataclass(frozen=True)
class PublishedSize:
    """Bytes in the format of Deep Compression (Han, Mao & Dally, ICLR 2016, arXiv:1510.00149)."""

    plain: int  # gaps, indices of fixed length or 32-bit values, codebooks: the columns P and P+Q
    coded: int  # with Huffman codes for gaps and indices: P+Q+H; code tables included


def published_size(weights: Mapping[str, Tensor]) -> PublishedSize:
    """Gaps of 8 bits in convolutions and 5 elsewhere; what is not pruned or shared takes 32 bits a
    value, as published. Quantized weights that were not pruned take their bits each.
    """
    plain = coded = 0.0
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            continue
        if name + SCALE in weights:
            integers = (tensor / multiplied(torch.ones_like(tensor), weights[name + SCALE])).round()
            if int(integers.count_nonzero()) > 0.9 * integers.numel():
                plain += integers.numel() * int(weights[name + WIDTH]) / 8
                coded += integers.numel() * int(weights[name + WIDTH]) / 8
                continue
            tensor = integers  # what the scales tell apart is one value
        nonzero = int(tensor.count_nonzero())
        book = codebook_of(tensor)
        if tensor.ndim < 2 or (nonzero == tensor.numel() and book is None):
            plain += 4 * tensor.numel()
            coded += 4 * tensor.numel()
            continue
        gap_bits = han.CONV_BITS if tensor.ndim == 4 else han.FC_BITS
        levels = (tensor != 0).int() if book is None else book.codes
        flat = levels.flatten().numpy().astype(np.uint16)
        if book is None:
            entries = len(han.entries(flat, gap_bits)[0])
            plain += entries * (gap_bits + 32) / 8
            coded += entries * (gap_bits + 32) / 8
        else:
            sizes = han.sizes(flat, len(book.values), gap_bits)
            plain += sizes.shared
            coded += sizes.coded
    return PublishedSize(round(plain), round(coded))
