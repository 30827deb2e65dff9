"""Distributed training of small networks: train, prune, retrain, compress, verify."""

from trainer.version import __version__

__all__ = ["__version__"]
