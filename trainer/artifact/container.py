"""The frame of a .dcz file: magic, header, sections, each with its length and checksum.

    "DCZ" version | header section | further sections | nothing after the last

    section = length (varint) | payload | CRC-32 (4 bytes, little-endian)

The CRC-32 of a section continues that of the section before it, beginning with the magic bytes. It
covers all payloads up to its own, so sections that were swapped are detected.

The header is JSON, compressed by Deflate with a preset dictionary of text that is common in
headers. This module does not interpret the sections: trainer.artifact.write and read do.
"""

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.compress.coding import CorruptError, varint

MAGIC = b"DCZ\x01"
MAGIC_2 = b"DCZ\x02"
MAGIC_3 = b"DCZ\x03"
"""Of versions 2 and 3, which have more kinds of entries, and are only used for files with such."""

HEADER_LIMIT = 1 << 22  # bytes of JSON

# Part of the format: the preset dictionary of Deflate. References to its end take the fewest bits,
# so text that is most common in headers comes last.
DICTIONARY = (
    b'"layer1.0.conv1.weight","layer1.0.bn1.running_mean","layer1.0.bn1.running_var",'
    b'"layer1.0.bn1.num_batches_tracked","downsample.0.weight","lstm.weight_ih_l0",'
    b'"lstm.weight_hh_l0","lstm.bias_ih_l0","lstm.bias_hh_l0","embedding.weight",'
    b'"classifier.0.bias","features.0.weight","trainer.models.'
    b'AlexNet","trainer.models.VGG16","trainer.models.ResNetCifar","trainer.models.ConvNet",'
    b'"depth":2,"kernel_size":3,"width":16,"in_channels":1,"classes":10},'
    b'"trainer.models.LeNet300","trainer.models.LeNet5",["i64",[],"r"],["conv3.weight",'
    b'["fc3.weight",["f32",[10,100],"c",["fc3.bias",["f32",[10],"r",'
    b'"deep_compression_lenet300","deep_compression","about":{"name":"smoke","seed":0,"model":'
    b'{"_target_":"trainer.models.LeNet5","validation_accuracy":0.99},"tensors":['
    b'["conv1.weight","f32",[20,1,5,5],"c",16,"f16"],["conv1.bias","f32",[20],"r","f16"],'
    b'["conv2.weight","f32",[50,20,5,5],"c",32,"f16"],["conv2.bias","f32",[50],"r","f16"],'
    b'["fc1.weight","f32",[500,800],"c",32,"f16"],["fc1.bias","f32",[500],"r","f16"],'
    b'["fc2.weight","f32",[10,500],"c",32,"f16"],["fc2.bias","f32",[10],"r","f16"]]}'
)


class ArtifactError(ValueError):
    """A file is not a compressed model, or it is truncated, damaged or forged."""


def join(header: Mapping[str, Any], sections: Sequence[bytes], magic: bytes = MAGIC) -> bytes:
    """The content of a file with a header and sections.

    Raises:
        ValueError: The header is longer than `HEADER_LIMIT`, so that readers would refuse it.
    """
    text = header_text(header)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15, 9, zlib.Z_DEFAULT_STRATEGY, DICTIONARY)
    packed = deflate.compress(text) + deflate.flush()
    parts = [magic]
    checksum = zlib.crc32(magic)
    for payload in (packed, *sections):
        checksum = zlib.crc32(payload, checksum)
        parts += [varint.encode(len(payload)), payload, struct.pack("<I", checksum)]
    return b"".join(parts)


def header_text(header: Mapping[str, Any]) -> bytes:
    """The header as JSON text.

    Raises:
        ValueError: It is longer than `HEADER_LIMIT`.
    """
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > HEADER_LIMIT:
        raise ValueError(
            f"the header takes {len(text)} bytes, but the format allows {HEADER_LIMIT}"
        )
    return text


def split(content: bytes) -> tuple[dict[str, Any], list[memoryview]]:
    """The header and the other sections of a file, with lengths and checksums verified.

    Raises:
        ArtifactError: The content is not that of a .dcz file, has an unknown version, or is
            truncated or damaged.
    """
    if content[:3] != MAGIC[:3]:
        raise ArtifactError("this is not a .dcz file: it does not begin with DCZ")
    if content[:4] not in (MAGIC, MAGIC_2, MAGIC_3):
        raise ArtifactError(f"version {content[3:4].hex() or 'none'} of the format is unknown")
    view = memoryview(content)
    place, checksum = 4, zlib.crc32(content[:4])
    sections: list[memoryview] = []
    while place < len(view) or not sections:
        try:
            length, place = varint.decode(content, place)
        except CorruptError as error:
            raise ArtifactError(
                f"the file is truncated or damaged: the length of a section: {error}"
            ) from error
        end = place + length
        if end + 4 > len(view):
            raise ArtifactError(f"the file is truncated: section {len(sections)} ends after it")
        payload = view[place:end]
        checksum = zlib.crc32(payload, checksum)
        if checksum != struct.unpack_from("<I", view, end)[0]:
            raise ArtifactError(f"the file is damaged: checksum of section {len(sections)}")
        sections.append(payload)
        place = end + 4
    return _header(sections[0]), sections[1:]


def _header(packed: memoryview) -> dict[str, Any]:
    inflate = zlib.decompressobj(-15, DICTIONARY)
    try:
        text = inflate.decompress(packed, HEADER_LIMIT)
        if not inflate.eof or inflate.unused_data:
            raise ArtifactError("the file is damaged: its header does not end with its section")
        header = json.loads(text)
        json.dumps(header, ensure_ascii=False).encode()  # refuses single surrogates
    except (zlib.error, ValueError, RecursionError) as error:
        raise ArtifactError(f"the header cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise ArtifactError("the file is damaged: its header is not a mapping")
    return header
