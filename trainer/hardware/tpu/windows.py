"""The windows of pooling calls."""

from typing import Any

import numpy as np
from torch import fx

from trainer.hardware.tpu.graph import Trace
from trainer.hardware.tpu.network import Value, Window


def pair(value: Any) -> tuple[int, int]:
    """A number for both dimensions, or one for each."""
    first, second = (value, value) if isinstance(value, int) else value
    return int(first), int(second)


def pooling_window(trace: Trace, node: fx.Node, source: Value) -> Window:
    """How a maximum or an average moves over images.

    Args:
        trace: Of the model.
        node: A max_pool, average_pool, adaptive_pool or mean.
        source: The images, [N, H, W, C].

    Raises:
        ConfigError: The source is not an image, or the TPU model lacks this kind of pooling.
    """
    kind, argument = trace.kind(node), trace.argument
    if len(source.shape) != 4:
        raise trace.refusal(node, "of values that are not images")
    height, width = source.shape[1:3]
    whole = Window((height, width), (height, width), (0, 0), 0)
    if kind == "mean":
        dimensions = argument(node, "dim", 1)
        if sorted(d % 4 for d in np.atleast_1d(dimensions)) != [2, 3]:
            raise trace.refusal(node, f"over the dimensions {dimensions}")
        return whole
    if kind == "adaptive_pool":
        if pair(argument(node, "output_size", 1)) != (1, 1):
            raise trace.refusal(node, "to more than one pixel")
        return whole
    kernel, stride = argument(node, "kernel_size", 1), argument(node, "stride", 2)
    padding = pair(argument(node, "padding", 3, 0))
    if kind == "max_pool":
        unusual = argument(node, "ceil_mode", 5, False)
        unusual = unusual or pair(argument(node, "dilation", 4, 1)) != (1, 1)
    else:
        unusual = argument(node, "ceil_mode", 4, False) or padding != (0, 0)
        unusual = unusual or argument(node, "divisor_override", 6) is not None
    if unusual:
        raise trace.refusal(node, "with ceil_mode, dilation, padded averages or divisor_override")
    return Window(pair(kernel), pair(stride or kernel), padding, 0)
