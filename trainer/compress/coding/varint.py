"""Unsigned integers in as few bytes as they need: 7 bits a byte, lowest first (LEB128)."""

from trainer.compress.coding.errors import CorruptError


def encode(value: int) -> bytes:
    """The bytes of a number >= 0; all but the last have their top bit set."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def decode(blob: bytes, at: int) -> tuple[int, int]:
    """The number that starts at byte `at`, and where the next one starts.

    Raises:
        CorruptError: The number is truncated, above 63 bits, or longer than needed.
    """
    value = 0
    for place in range(9):
        if at >= len(blob):
            raise CorruptError("a number is truncated")
        byte = blob[at]
        at += 1
        value |= (byte & 127) << (7 * place)
        if byte < 128:
            if byte == 0 and place:
                raise CorruptError("a number is longer than it needs to be")
            return value, at
    raise CorruptError("a number is too large")
