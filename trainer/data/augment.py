"""Augmentation of whole batches: a pure function of (seed, epoch, sample index)."""

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from trainer.data.hashing import mix, mix_indices


def shift(inputs: Tensor, indices: Tensor, epoch: int, *, seed: int, pixels: int) -> Tensor:
    """Shift each image by a whole number of pixels in each direction, drawn uniformly.

    Pixels that move in are zero, so shift before normalising, while zero is the background.

    Args:
        inputs: Images [N, C, H, W] of any type.
        indices: Numbers of the samples, int64 [N].
        epoch: Number of the epoch.
        seed: Together with epoch and index, it determines the shift of an image.
        pixels: Maximum shift in each direction.

    Returns:
        The shifted images, of the same shape and type.
    """
    n, channels, height, width = inputs.shape
    span = 2 * pixels + 1
    # One of span^2 positions per sample. The bias of the remainder is below span^2 / 2^64.
    cells = mix_indices(mix(seed, epoch), indices) % np.uint64(span * span)
    top, left = np.divmod(cells.astype(np.int64), span)

    padded = pad(inputs, (pixels, pixels, pixels, pixels)).contiguous()
    # Every window of the padded batch is a view that starts at one of its elements, so all
    # images are shifted by one indexed copy of n windows.
    rows, columns = padded.shape[2:]
    plane = rows * columns
    starts = torch.from_numpy(np.arange(n) * (channels * plane) + top * columns + left)
    reach = (channels - 1) * plane + (height - 1) * columns + width - 1  # of a window's last pixel
    windows = padded.as_strided(
        (max(padded.numel() - reach, 0), channels, height, width), (1, plane, columns, 1)
    )
    return windows.index_select(0, starts)
