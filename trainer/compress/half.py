"""Which numbers of a .dcz file are fp16, and how they are rounded.

Those are the codebooks of shared weights, and tensors of at most one dimension: biases, norms,
running statistics. The writer asks here, and so does the phase that leaves a model as its file will
decode.
"""

from collections.abc import Container

import torch
from torch import Tensor, nn

from trainer.compress.codebooks import distinct_values
from trainer.compress.quantize import is_quantizer_entry

_ERROR = 2.0**-10  # of the largest magnitude


def is_exact(name: str, names: Container[str]) -> bool:
    """Whether an entry of a state_dict is never rounded: of a quantizer, or a weight that has one.

    Args:
        names: of the state_dict.
    """
    return is_quantizer_entry(name) or f"{name}_quantizer.scale" in names


def to_half(values: Tensor) -> Tensor:
    """`values` (float32) in fp16, or unchanged where that would lose more than the last bits.

    It would if one becomes Inf or NaN or, not being zero, zero, or is off by more than 2^-10 of the
    largest magnitude.
    """
    half = values.half()
    if not values.numel():
        return half
    error = (half.float() - values).abs().amax()  # NaN where an Inf was
    fits = bool(error <= _ERROR * values.abs().amax()) and torch.equal(half != 0, values != 0)
    return half if fits and bool(half.isfinite().all()) else values


def shared_values(tensor: Tensor) -> Tensor | None:
    """The values of a tensor that counts as shared, ascending; None for any other.

    One that is written as a codebook: float32, not empty, few distinct values, and no minus zero.
    """
    if tensor.dtype != torch.float32 or not tensor.numel() or _has_minus_zero(tensor):
        return None
    return distinct_values(tensor, any_repeat=tensor.ndim > 1)


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Round in place what a .dcz file with fp16 numbers rounds.

    So the model that is validated is the one that the file decodes to, bit for bit.
    """
    state = model.state_dict()
    for name, tensor in state.items():
        if tensor.dtype != torch.float32 or is_exact(name, state):
            continue
        if tensor.ndim < 2:
            tensor.copy_(to_half(tensor))
        elif (values := shared_values(tensor)) is not None:
            there = tensor != 0
            places = torch.searchsorted(values, tensor[there])
            tensor[there] = to_half(values).float()[places]


def _has_minus_zero(tensor: Tensor) -> bool:
    return bool((tensor.contiguous().view(torch.int32) == -(1 << 31)).any())
