"""Datasets, and the order in which the workers read their samples.

`data._target_` names a callable that takes the other settings of the `data` section, and `seed` if
it accepts one, and returns `Splits`, such as `mnist`, `text`, `images`, `table`, `huggingface`,
`dataset` and `stream`.
"""

from trainer.data.characters import text
from trainer.data.collate import Pad
from trainer.data.datasets import dataset
from trainer.data.huggingface import huggingface
from trainer.data.idx import mnist
from trainer.data.images import images
from trainer.data.order import global_batches, permutation, shard
from trainer.data.sources import as_splits
from trainer.data.split import Split, Splits, TensorSplit
from trainer.data.streaming import stream
from trainer.data.table import table

__all__ = [
    "Pad",
    "Split",
    "Splits",
    "TensorSplit",
    "as_splits",
    "dataset",
    "global_batches",
    "huggingface",
    "images",
    "mnist",
    "permutation",
    "shard",
    "stream",
    "table",
    "text",
]
