"""The mean of values that travel as 8-bit integers, or as floating-point numbers of 16 bits.

A ring would round each partial sum anew. Here a value is rounded twice, whatever the number of
ranks: on the way to the rank that averages its part of the tensor, and on the way back. Each rank
knows both errors that it made, so that error feedback can correct them (the scheme of Tang et al.,
1-bit Adam, ICML 2021, arXiv:2102.02888).
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.engine.ring import Buffers, start_all_gather
from trainer.engine.transport import Transport

BLOCK = 256  # values with a scale of their own


class Codec(Protocol):
    """A number format for the network."""

    block: int  # the lengths of tensors are multiples of it

    def coded_bytes(self, length: int) -> int:
        """Size of `length` values."""

    def encode(self, values: Tensor, coded: Tensor) -> None:
        """Write float32 [length] as uint8 [coded_bytes(length)]."""

    def decode(self, coded: Tensor, values: Tensor) -> None:
        """The reverse; `values` gets the same bits wherever `coded` has them."""


class Int8Blocks:
    """One byte for each value: a multiple of 1/127 of the largest magnitude in its block.

    Blockwise quantization: Dettmers et al., 8-bit Optimizers via Block-wise Quantization, ICLR 2022
    (arXiv:2110.02861); their codes are not evenly spaced. A block takes BLOCK bytes and 4 for its
    scale. Values are rounded to the nearest, so |error| <= scale / 2. If one value of a block is
    NaN or infinite, so is its scale, and all of its values arrive as NaN.
    """

    block = BLOCK

    def coded_bytes(self, length: int) -> int:
        return length + 4 * (length // BLOCK)

    def encode(self, values: Tensor, coded: Tensor) -> None:
        blocks = values.view(-1, BLOCK)
        scales, codes = _split(coded, len(blocks))
        steps = blocks.abs()
        torch.amax(steps, 1, out=scales)
        scales.div_(127)
        scales.masked_fill_(scales < torch.finfo(torch.float32).tiny, 0)  # sent as zeros
        inverse = scales.reciprocal().masked_fill_(scales == 0, 0)
        torch.mul(blocks, inverse[:, None], out=steps)
        codes.copy_(steps.round_().clamp_(-127, 127))  # of a NaN: any code times a NaN is NaN

    def decode(self, coded: Tensor, values: Tensor) -> None:
        scales, codes = _split(coded, len(values) // BLOCK)
        torch.mul(codes, scales[:, None], out=values.view(-1, BLOCK))


def _split(coded: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The scales [blocks] and codes [blocks, BLOCK] in an encoded tensor."""
    scales, codes = coded.split((4 * blocks, blocks * BLOCK))
    return scales.view(torch.float32), codes.view(torch.int8).view(blocks, BLOCK)


class Rounded:
    """A floating-point type of PyTorch, such as torch.bfloat16."""

    block = 1

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def coded_bytes(self, length: int) -> int:
        return length * self._dtype.itemsize

    def encode(self, values: Tensor, coded: Tensor) -> None:
        coded.view(self._dtype).copy_(values)

    def decode(self, coded: Tensor, values: Tensor) -> None:
        values.copy_(coded.view(self._dtype))


class Quantized:
    """See `Lossy`. The tensor is cut into one part per rank, which that rank averages in float32.

    A rank sends (N-1)/N of the encoded tensor to the others, and N-1 times its own part of the
    mean: 2 (N-1)/N of the size in all, as in a ring.
    """

    def __init__(self, transport: Transport, codec: Codec) -> None:
        self.sent_bytes = 0
        self._transport = transport
        self._codec = codec
        self._buffers = Buffers()

    def mean_(self, values: Tensor, error: Tensor | None) -> None:
        rank, size = self._transport.rank, self._transport.size
        codec, count, device = self._codec, len(values), values.device
        length = -(-count // (size * codec.block)) * codec.block  # of a part; the last may be short
        coded_bytes = codec.coded_bytes(length)

        def buffer(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
            return self._buffers.get(name, rows * columns, dtype, device).view(rows, columns)

        parts = buffer("parts", size, length, torch.float32)
        parts.view(-1)[:count].copy_(values)
        parts.view(-1)[count:].zero_()
        outbox = buffer("outbox", size, coded_bytes, torch.uint8)
        inbox = buffer("inbox", size, coded_bytes, torch.uint8)
        (decoded,) = buffer("decoded", 1, length, torch.float32)

        handles = []
        for distance in range(1, size):
            to, source = (rank + distance) % size, (rank - distance) % size
            codec.encode(parts[to], outbox[to])
            handles.append(self._transport.exchange(outbox[to], to, inbox[source], source))
            if error is not None:
                codec.decode(outbox[to], decoded)
                parts[to].sub_(decoded)
        own = parts[rank]
        for handle in handles:
            handle.wait()
        for source in range(size):
            if source != rank:
                codec.decode(inbox[source], decoded)
                own.add_(decoded)
        own.div_(size)

        mean = inbox[rank]
        codec.encode(own, mean)
        handles = start_all_gather(self._transport, inbox)
        if error is not None:
            codec.decode(mean, decoded)
            own.sub_(decoded).mul_(size)  # this rank's share of a sum over `size` ranks
            error.copy_(parts.view(-1)[:count])
        for handle in handles:
            handle.wait()
        for source in range(size):
            codec.decode(inbox[source], parts[source])
        values.copy_(parts.view(-1)[:count])
        self.sent_bytes += 2 * (size - 1) * coded_bytes

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
