"""The simulators compared with published tables: paper, ours, difference."""

from trainer.hardware.comparison.eie import eie_tables, published_layer
from trainer.hardware.comparison.table import ComparisonTable, compare, percent
from trainer.hardware.comparison.tpu import tpu_tables

__all__ = [
    "ComparisonTable",
    "compare",
    "eie_tables",
    "percent",
    "published_layer",
    "tpu_tables",
]
