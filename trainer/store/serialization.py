"""Tensors and states as the bytes of a safetensors file: nothing is pickled.

The tensors of a nested state are those of the file; the rest of the state is JSON in its metadata.
Workers make such bytes, the driver writes them (trainer.store.checksummed).
"""

import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.compress.state import model_state, type_name
from trainer.errors import ConfigError
from trainer.store.checksummed import head, split

STATE = "state"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Named tensors as the content of a safetensors file.

    Tied tensors are written under each of their names, so that `load_state_dict` takes the file
    as it is. Every tensor is copied once; the library's own writer needs three copies, and training
    waits for them. Raises TypeError for a type of numbers that such files do not know.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    parts: list[Any] = []
    end = 0
    # The widest numbers first: each lies at a multiple of its size.
    for key, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{key}: {tensor.dtype} cannot be kept in a safetensors file")
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + flat.nbytes],
        }
        parts.append(flat)
        end += flat.nbytes
    return b"".join([head(header), *parts])


def check_state(model: nn.Module) -> None:
    """Refuse a model whose state a checkpoint cannot hold. The model may be on the meta device.

    Raises:
        ConfigError: The message names the entry, its type, and what to do.
    """
    for name, tensor in model_state(model).items():
        if tensor.dtype not in _DTYPES:
            raise ConfigError(
                f"model: {name} is of type {type_name(tensor)}, which checkpoints cannot hold; "
                f"they hold {', '.join(str(t).removeprefix('torch.') for t in _DTYPES)}"
            )


def from_bytes(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, from its content."""
    header, _ = split(content)
    metadata: dict[str, str] = header.get("__metadata__", {})
    return safetensors.torch.load(content), metadata


def pack(state: Mapping[str, Any]) -> bytes:
    """A nested state of mappings, lists, tensors and plain values as a safetensors file."""
    tensors: dict[str, Tensor] = {}
    skeleton = _strip(state, "", tensors)
    return to_bytes(tensors, {STATE: json.dumps(skeleton)})


def unpack(content: bytes) -> dict[str, Any]:
    """The state that `pack` was given; tuples come back as lists."""
    tensors, metadata = from_bytes(content)
    state: dict[str, Any] = _fill(json.loads(metadata[STATE]), tensors)
    return state


def _strip(node: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The JSON skeleton of a state; its tensors go into `tensors` under their paths."""
    if isinstance(node, Tensor):
        tensors[path] = node
        return {"tensor": path}
    if isinstance(node, Mapping):
        pairs = [[key, _strip(value, f"{path}/{key}", tensors)] for key, value in node.items()]
        return {"mapping": pairs}
    if isinstance(node, list | tuple):
        return {"list": [_strip(value, f"{path}/{i}", tensors) for i, value in enumerate(node)]}
    if node is None or isinstance(node, bool | int | float | str):
        return {"value": node}
    raise TypeError(f"{path}: a {type(node).__name__} cannot be kept in a checkpoint")


def _fill(node: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = node.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "mapping":
            return {key: _fill(value, tensors) for key, value in content}
        case "list":
            return [_fill(value, tensors) for value in content]
        case _:
            return content
