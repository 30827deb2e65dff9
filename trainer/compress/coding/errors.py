"""The error of all coders."""


class CorruptError(ValueError):
    """Bytes are not what a coder made for this shape."""
