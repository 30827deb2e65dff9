"""Data sets, and the order in which every number of workers sees them.

`data._target_` names a callable that takes the other settings of the `data` group and `seed`, and
returns `Splits`. The ones that ship are `mnist.mnist`, `text.text` and `dataset.dataset`.
"""

from trainer.data.order import global_batches, permutation, shard
from trainer.data.split import Split, Splits, TensorSplit

__all__ = ["Split", "Splits", "TensorSplit", "global_batches", "permutation", "shard"]
