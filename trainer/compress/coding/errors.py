"""What a decoder raises."""


class CorruptError(ValueError):
    """The bytes are not what an encoder wrote: damaged, truncated or forged."""
