"""The largest values of a gradient only.

Lin et al., Deep Gradient Compression, ICLR 2018 (arXiv:1712.01887), without its correction of the
momentum.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.engine.lossy.base import Part
from trainer.engine.ring import start_all_gather


class TopK:
    """See `Lossy`. Every rank sends its values of largest magnitude, and their positions, to all.

    A rank sends N-1 times 8 bytes for each of them. The result is the sum in the order of ranks,
    divided by N; where no rank sent a value, it is zero. NaN counts as the largest magnitude.

    Args:
        part: What is averaged.
        fraction: Of the values that a rank sends, in (0, 1]; at least one.
    """

    def __init__(self, part: Part, fraction: float) -> None:
        self.sent_bytes = 0
        self._transport = part.transport
        self._fraction = fraction

    def mean_(self, values: Tensor, error: Tensor | None) -> None:
        rank, size = self._transport.rank, self._transport.size
        count = max(1, round(self._fraction * len(values)))
        positions = values.abs().topk(count, sorted=False).indices.sort().values
        if error is not None:
            error.copy_(values)
            error[positions] = 0
        messages = torch.empty(size, 2 * count, dtype=torch.int32, device=values.device)
        messages[rank, :count] = positions
        messages[rank, count:] = values[positions].view(torch.int32)
        for handle in start_all_gather(self._transport, messages):
            handle.wait()
        self.sent_bytes += (size - 1) * messages[rank].nbytes
        values.zero_()
        for message in messages:
            positions = message[:count].long()  # no two are the same
            values[positions] += message[count:].view(torch.float32)
        values.div_(size)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
