"""Weights as bytes: the content of a safetensors file, made by a worker, written by the driver."""

from collections.abc import Mapping

import safetensors.torch
from torch import Tensor


def to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """A state_dict as the content of a safetensors file.

    Tied tensors are written under each of their names, so that `load_state_dict` takes the file
    as it is.
    """
    separate = {
        key: value.detach().to("cpu", copy=True).contiguous() for key, value in state.items()
    }
    return safetensors.torch.save(separate, metadata={"format": "pt"})
