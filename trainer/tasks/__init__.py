"""Tasks: the loss to minimize, the metrics, and how a model is called with a batch.

`task._target_` names one of these classes, or one of your own that derives from `Task`.
"""

from trainer.tasks.base import Task
from trainer.tasks.classify import Classification, LanguageModel, Segmentation
from trainer.tasks.custom import Custom
from trainer.tasks.metrics import Average, Metric, TorchMetric
from trainer.tasks.regress import MultiLabel, Regression

__all__ = [
    "Average",
    "Classification",
    "Custom",
    "LanguageModel",
    "Metric",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Task",
    "TorchMetric",
]
