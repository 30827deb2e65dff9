"""Distributed training of small networks: train, prune, retrain, compress, verify."""

__version__ = "0.1.0"
