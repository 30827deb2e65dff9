"""Contract suites for your own extensions: functions that check a class of yours.

They raise AssertionError, so that they can be called from a test.
"""

from trainer.testing.coders import check_coder
from trainer.testing.layers import check_quantized_layer
from trainer.testing.sinks import check_sink

__all__ = ["check_coder", "check_quantized_layer", "check_sink"]
