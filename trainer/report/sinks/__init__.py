"""Sinks of the messages that a run reports. `Sink` is the protocol; see docs/own-sink.md.

The classes for TensorBoard, Weights & Biases and MLflow are imported where they are used, since
their libraries are slow to import or optional.
"""

from trainer.report.sinks.base import ScalarSink, Sink
from trainer.report.sinks.csv_file import CsvSink
from trainer.report.sinks.files import LogSink, MembersSink, MetricsSink

__all__ = ["CsvSink", "LogSink", "MembersSink", "MetricsSink", "ScalarSink", "Sink"]
