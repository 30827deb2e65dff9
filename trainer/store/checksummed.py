"""Safetensors files with a checksum, which is verified before anything in them is used.

The checksum is a SHA-256 of header and data, stored in the file's own metadata, so that any
safetensors library can read the file. This module handles bytes only and does not import torch.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

CHECKSUM = "sha256"


class DamagedError(ValueError):
    """A file is truncated or was changed after it was written."""


def write_checksummed(
    file: BinaryIO, content: bytes | memoryview, about: Mapping[str, Any]
) -> None:
    """Write `content`, the bytes of a safetensors file, with its checksum.

    Args:
        about: Plain values that `read_checksummed` returns, stored as JSON in the metadata.
    """
    header, data = split(content)
    header["__metadata__"]["about"] = json.dumps(about)
    header["__metadata__"][CHECKSUM] = _digest(header, data)
    file.write(head(header))
    file.write(data)


def read_checksummed(path: Path) -> tuple[bytes, dict[str, Any]]:
    """The content that was given to `write_checksummed`, byte for byte, and its `about`.

    Raises:
        DamagedError: The file is truncated or was changed.
        OSError: It cannot be read.
    """
    content = path.read_bytes()
    try:
        header, data = split(content)
        checksum = header["__metadata__"].pop(CHECKSUM)
        whole = _digest(header, data) == checksum
        about = json.loads(header["__metadata__"].pop("about"))
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise DamagedError(f"{path}: not a checkpoint, or damaged: {error}") from error
    if not whole:
        raise DamagedError(f"{path}: damaged: its checksum does not match")
    return b"".join([head(header), data]), about


def head(header: Mapping[str, Any]) -> bytes:
    """The beginning of a safetensors file: the length of its header, and the header."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def split(content: bytes | memoryview) -> tuple[dict[str, Any], memoryview]:
    """The parsed header of a safetensors file, and its data. Raises ValueError or struct.error."""
    (length,) = struct.unpack_from("<Q", content)
    if 8 + length > len(content):
        raise ValueError("it is truncated")
    header: dict[str, Any] = json.loads(bytes(content[8 : 8 + length]))
    return header, memoryview(content)[8 + length :]


def _digest(header: Mapping[str, Any], data: memoryview) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()
