"""The six applications of the TPU's paper, with assumed layer shapes.

Jouppi et al., ISCA 2017, arXiv:1704.04760, table 1 gives the number of layers, the weights and the
batch of each application, but no shapes. The shapes below were fixed before any result was
compared with the paper; `ASSUMPTIONS` states where each comes from.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch

from trainer.hardware.tpu.arithmetic import raw_sums
from trainer.hardware.tpu.compiler import compile_network
from trainer.hardware.tpu.cycles import TpuCycles, count_cycles
from trainer.hardware.tpu.network import Layer, Network, Pool, Product, Rows, Value, Window
from trainer.hardware.tpu.settings import TPU_V1, TpuSettings

ASSUMPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "MLP0": "5 equal square layers with 20M weights: 2000 x 2000.",
        "MLP1": "4 equal square layers with 5M weights: 1118 x 1118.",
        "LSTM0": "24 gates of 6 LSTM layers with 1024 cells, the width of GNMT (Wu et al. 2016, "
        "arXiv:1609.08144): 2048 x 1024, 50.3M weights. 16-bit activations.",
        "LSTM1": "94 matrices of 600 x 600, the shape that the paper names, in 37 layers: 33.8M "
        "weights. 16-bit activations.",
        "CNN0": "AlphaGo's policy network (Silver et al. 2016) on 19 x 19 points, with 16 layers "
        "and with 256 filters, of the numbers that its authors tried the closest to 8M weights: "
        "5 x 5 on 48 planes, fourteen 3 x 3, one 1 x 1; 8.6M weights.",
        "CNN1": "Inception with batch norm (Ioffe & Szegedy 2015, arXiv:1502.03167), which has the "
        "13 poolings of table 1 and 69 of its 72 convolutions, on images of 360 pixels, which give "
        "the 1750 operations per weight of table 1; then 4 equal square layers with the other 90M "
        "of its 100M weights.",
    }
)
"""Where the shapes come from. That LSTMs use 16-bit activations, which halves the speed of the
matrix unit, is read from table 3: its row 9 is about half of its row 2 times the peak."""


@dataclass(frozen=True)
class Shape:
    """A layer without values."""

    rows: int
    """Positions of a sample at which the layer is computed: 1 if it is fully connected."""
    inputs: int
    """Channels of the source."""
    outputs: int
    """Channels of the result."""
    kernel: int = 1
    """Side of a convolution's kernel."""
    matrices: int = 1
    """Matrices of this shape, side by side."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.matrices * self.kernel**2 * self.inputs * self.outputs


@dataclass(frozen=True)
class Pooling:
    """A pooling without values, by the activation unit."""

    before: int
    """Positions of a sample that are read."""
    rows: int
    """Positions of a sample in the result."""
    channels: int
    weights: int = 0


@dataclass(frozen=True)
class Application:
    """An application of table 1."""

    batch: int
    layers: tuple[Shape | Pooling, ...]
    input_bytes: int
    """Bytes of a sample."""
    activation_bytes: int = 1

    @property
    def weights(self) -> int:
        """Number of weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def intensity(self) -> float:
        """Multiply-accumulates for each byte of weights."""
        return self.batch * sum(x.rows * x.weights for x in self.layers) / self.weights


def inception(side: int) -> tuple[Shape | Pooling, ...]:
    """The convolutions and poolings of Inception with batch norm on images of `side` pixels.

    Ioffe & Szegedy 2015, arXiv:1502.03167, figure 5.
    """
    sides = [side]
    for _ in range(5):
        sides.append(-(-sides[-1] // 2))
    _, half, quarter, eighth, sixteenth, last = (n * n for n in sides)
    layers: list[Shape | Pooling] = [Shape(half, 3, 64, 7), Pooling(half, quarter, 64)]
    layers += [Shape(quarter, 64, 64), Shape(quarter, 64, 192, 3), Pooling(quarter, eighth, 192)]
    # Channels of: source, 1x1, reduction and 3x3, reduction and double 3x3, projection.
    modules = (
        (eighth, eighth, 192, 64, 64, 64, 64, 96, 32),
        (eighth, eighth, 256, 64, 64, 96, 64, 96, 64),
        (eighth, sixteenth, 320, 0, 128, 160, 64, 96, 0),
        (sixteenth, sixteenth, 576, 224, 64, 96, 96, 128, 128),
        (sixteenth, sixteenth, 576, 192, 96, 128, 96, 128, 128),
        (sixteenth, sixteenth, 576, 160, 128, 160, 128, 160, 96),
        (sixteenth, sixteenth, 576, 96, 128, 192, 160, 192, 96),
        (sixteenth, last, 576, 0, 128, 192, 192, 256, 0),
        (last, last, 1024, 352, 192, 320, 160, 224, 128),
        (last, last, 1024, 352, 192, 320, 192, 224, 128),
    )
    for before, after, source, single, reduced, three, reduced2, double, projection in modules:
        layers += [Shape(before, source, single)] if single else []
        layers += [Shape(before, source, reduced), Shape(after, reduced, three, 3)]
        layers += [Shape(before, source, reduced2), Shape(before, reduced2, double, 3)]
        layers += [Shape(after, double, double, 3), Pooling(before, after, source)]
        layers += [Shape(before, source, projection)] if projection else []
    return (*layers, Pooling(last, 1, 1024))


_POINTS = 19 * 19  # of a Go board
_SIDE = 360  # pixels of CNN1's images

APPLICATIONS: Mapping[str, Application] = MappingProxyType(
    {
        "MLP0": Application(200, 5 * (Shape(1, 2000, 2000),), 2000),
        "MLP1": Application(168, 4 * (Shape(1, 1118, 1118),), 1118),
        "LSTM0": Application(64, 24 * (Shape(1, 2048, 1024),), 2048, activation_bytes=2),
        "LSTM1": Application(
            96,
            17 * (Shape(1, 600, 600, matrices=2),) + 20 * (Shape(1, 600, 600, matrices=3),),
            1200,
            activation_bytes=2,
        ),
        "CNN0": Application(
            8,
            (
                Shape(_POINTS, 48, 256, 5),
                *14 * (Shape(_POINTS, 256, 256, 3),),
                Shape(_POINTS, 256, 1),
            ),
            _POINTS * 48,
        ),
        "CNN1": Application(32, inception(_SIDE) + 4 * (Shape(1, 4739, 4739),), _SIDE * _SIDE * 3),
    }
)


def application_network(application: Application) -> Network:
    """A Sequential of the layers of an application, with zero weights.

    It serves to count cycles: a layer reads the result of the one before it, also if sizes differ.
    """
    dtype = np.dtype(np.uint8 if application.activation_bytes == 1 else np.uint16)
    value = Value("input", (application.batch, application.input_bytes), np.dtype(np.uint8))
    first = value
    layers: list[Layer] = []
    for number, shape in enumerate(application.layers):
        if isinstance(shape, Pooling):
            # The branches of a module are layers in turn here: a pooling reads the module's input.
            source = replace(value, shape=(application.batch * shape.before, shape.channels))
            value = Value(
                f"result {number}", (application.batch * shape.rows, shape.channels), dtype
            )
            layers.append(Pool(f"pooling {number}", source, value, _window(3), 0, None))
            continue
        outputs = shape.matrices * shape.outputs
        rows = application.batch * shape.rows
        result = Value(f"result {number}", (rows, outputs), dtype)
        weights = (shape.matrices, shape.outputs, shape.kernel**2, shape.inputs)
        layers.append(
            Product(
                name=f"layer {number}",
                source=Rows(value),
                destination=Rows(result),
                rows=rows,
                weights=np.broadcast_to(np.int8(0), weights),  # takes no memory
                epilogue=raw_sums(np.zeros(outputs, np.int64)),
                window=_window(shape.kernel) if shape.kernel > 1 else None,
                activation_bytes=application.activation_bytes,
            )
        )
        value = result
    return Network(
        layers=layers,
        input=first,
        output=value,
        quantize=lambda samples: samples.numpy().astype(np.uint8),
        dequantize=lambda integers: torch.from_numpy(integers.astype(np.float32)),
    )


def _window(kernel: int) -> Window:
    return Window((kernel, kernel), (1, 1), (kernel // 2, kernel // 2), 0)


def application_cycles(application: Application, settings: TpuSettings = TPU_V1) -> TpuCycles:
    """Cycles of an application at its batch size.

    The unified buffer counts as large enough: weights are read anew for every few rows, so that a
    batch that is computed in parts takes as long.
    """
    unlimited = replace(settings, unified_buffer=1 << 40)
    return count_cycles(compile_network(application_network(application), unlimited))
