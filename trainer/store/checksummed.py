"""Safetensors files with a seal: written by the driver, checked before anything in them is used.

The seal is a SHA-256 over header and data, in the file's own metadata: any safetensors library
reads the file as it is. This module knows bytes only, and does not import torch.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

SEAL = "sha256"


class DamagedError(ValueError):
    """A file is not what was written: cut short, or changed."""


def write_sealed(file: BinaryIO, content: bytes | memoryview, about: Mapping[str, Any]) -> None:
    """Write `content`, the bytes of a safetensors file, with its seal.

    Args:
        about: plain values that `read_sealed` gives back, stored as JSON beside the seal.
    """
    header, data = split(content)
    header["__metadata__"]["about"] = json.dumps(about)
    header["__metadata__"][SEAL] = _digest(header, data)
    file.write(head(header))
    file.write(data)


def read_sealed(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The content of a sealed file, and what was said about it.

    Raises:
        DamagedError: it is not what was written.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    try:
        header, data = split(content)
        seal = header["__metadata__"].pop(SEAL)
        about = json.loads(header["__metadata__"]["about"])
        whole = _digest(header, data) == seal
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise DamagedError(f"{path}: no checkpoint, or damaged: {error}") from error
    if not whole:
        raise DamagedError(f"{path}: damaged: its checksum does not match")
    return content, about


def head(header: Mapping[str, Any]) -> bytes:
    """What a safetensors file begins with: the length of its header, and the header."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def split(content: bytes | memoryview) -> tuple[dict[str, Any], memoryview]:
    """The parsed header of a safetensors file, and its data. Raises ValueError or struct.error."""
    (length,) = struct.unpack_from("<Q", content)
    if 8 + length > len(content):
        raise ValueError("cut short")
    header: dict[str, Any] = json.loads(bytes(content[8 : 8 + length]))
    return header, memoryview(content)[8 + length :]


def _digest(header: Mapping[str, Any], data: memoryview) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()
