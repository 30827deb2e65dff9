"""Compressed models: `encode` makes the bytes of a .dcz file, `load` a state_dict of one.

    model.load_state_dict(trainer.artifact.load("model.dcz"))

docs/artifact.md specifies the format. `python -m trainer.artifact` looks into files.
"""

from trainer.artifact.comparison import PublishedSize, published_size
from trainer.artifact.container import ArtifactError
from trainer.artifact.read import Description, describe, load, loads, read_about
from trainer.artifact.write import check, encode, try_coder

__all__ = [
    "ArtifactError",
    "Description",
    "PublishedSize",
    "check",
    "describe",
    "encode",
    "load",
    "loads",
    "published_size",
    "read_about",
    "try_coder",
]
