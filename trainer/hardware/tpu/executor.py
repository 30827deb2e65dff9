"""Execute a program: the values that the TPU computes, bit for bit."""

from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from trainer.errors import RunError
from trainer.hardware.tpu.arithmetic import Ints
from trainer.hardware.tpu.compiler import Program
from trainer.hardware.tpu.instructions import (
    Activate,
    MatrixMultiply,
    ReadHostMemory,
    ReadWeights,
    SetConfiguration,
    Vector,
    WriteHostMemory,
)
from trainer.hardware.tpu.network import (
    CellUpdate,
    Layer,
    Pool,
    Product,
    Rows,
    update_cell,
)

_EXACT_IN_FLOAT32 = 1 << 24  # integers below it are exact in float32
_LARGEST_PRODUCT = 255 * 128


def execute(program: Program, samples: Tensor) -> Tensor:
    """The output of the model for a batch, computed by the program.

    Args:
        program: Compiled for batches of this shape.
        samples: As the model takes them.

    Raises:
        RunError: The batch has another shape than the program was compiled for.
    """
    network = program.network
    return network.dequantize(execute_integers(program, network.quantize(samples)))


def execute_integers(program: Program, integers: NDArray[np.uint8]) -> NDArray[np.integer]:
    """As `execute`, from the integers of the network's input to those of its output."""
    expected = program.network.input.shape
    if integers.shape != expected:
        raise RunError(
            f"the program was compiled for inputs {list(expected)}, not {list(integers.shape)}"
        )
    machine = _Machine(program)
    machine.host[program.network.input.name] = integers
    for instruction in program.instructions:
        machine.step(instruction)
    return machine.host[program.network.output.name]


class _Machine:
    """The state of a TPU: memories, the tile in the array, the layer that is configured."""

    def __init__(self, program: Program) -> None:
        settings = program.settings
        self._program = program
        self.host: dict[str, NDArray[Any]] = {}
        self._buffer = np.zeros(program.buffer_bytes, np.uint8)
        self._accumulators = np.zeros((settings.accumulators, settings.array_size), np.int32)
        self._fifo: deque[int] = deque()
        # A column's sum of products is exact in float32, whose matrix product is the fastest.
        largest_sum = settings.array_size * _LARGEST_PRODUCT
        self._dtype = np.float32 if largest_sum < _EXACT_IN_FLOAT32 else np.float64
        self._tile = np.zeros((0, 0), self._dtype)  # [inputs, columns]
        self._layer: Layer | None = None
        self._rows: NDArray[np.uint8] = np.zeros((0, 0, 0), np.uint8)

    def step(self, instruction: object) -> None:
        match instruction:
            case ReadHostMemory(name, address, size):
                self._read_host(name, address, size)
            case WriteHostMemory(name):
                value = self._program.network.output
                self.host[name] = self._view(Rows(value), value.rows).reshape(value.shape).copy()
            case ReadWeights(tile):
                if len(self._fifo) == self._program.settings.weight_fifo_tiles:
                    raise RunError(f"the program reads tile {tile} into a full weight FIFO")
                self._fifo.append(tile)
            case SetConfiguration(layer):
                self._configure(self._program.network.layers[layer])
            case MatrixMultiply():
                self._multiply(instruction)
            case Activate():
                self._activate(instruction)
            case Vector():
                self._vector()

    def _read_host(self, name: str, address: int, size: int) -> None:
        memory = self._buffer[address : address + size]
        if name in self._program.network.initial:
            memory[:] = self._program.network.initial[name]
        else:
            memory[:] = self.host[name].reshape(-1)

    def _configure(self, layer: Layer) -> None:
        self._layer = layer
        if isinstance(layer, Product):
            source = layer.source.value
            if layer.window is None:
                rows = self._view(layer.source, layer.rows)
                self._rows = rows.reshape(layer.rows, 1, source.channels)
            else:
                images = self._view(layer.source, source.rows).reshape(source.shape)
                patches = layer.window.patches(images)
                positions = patches.shape[3] * patches.shape[4]
                self._rows = patches.reshape(layer.rows, positions, source.channels)

    def _multiply(self, x: MatrixMultiply) -> None:
        layer = self._layer
        assert isinstance(layer, Product)
        if x.next_tile:
            if not self._fifo:
                raise RunError("the program takes a tile from an empty weight FIFO")
            tile = self._program.tiles[self._fifo.popleft()]
            weights = layer.weights[tile.group].reshape(layer.outputs, layer.depth)
            block = weights[
                tile.first_output : tile.first_output + tile.outputs,
                tile.first_input : tile.first_input + tile.inputs,
            ]
            self._tile = block.T.astype(self._dtype)
        channels = layer.weights.shape[3]
        rows = self._rows[x.first_row : x.first_row + x.rows]
        if layer.groups > 1:
            rows = rows[:, :, x.group * channels : (x.group + 1) * channels]
        inputs = rows.reshape(x.rows, -1)[:, x.first_input : x.first_input + x.inputs]
        sums = (inputs.astype(self._dtype) @ self._tile).astype(np.int32)
        target = self._accumulators[x.accumulator : x.accumulator + x.rows, : x.columns]
        if x.accumulate:
            target += sums
        else:
            target[:] = sums

    def _activate(self, x: Activate) -> None:
        layer = self._layer
        assert isinstance(layer, Product)
        rows = slice(x.first_row, x.first_row + x.rows)
        channels = slice(x.first_channel, x.first_channel + x.columns)
        sums = self._accumulators[x.accumulator : x.accumulator + x.rows, : x.columns]
        operand: Ints | None = None
        if layer.operand is not None:
            operand = self._view(layer.operand, layer.rows)[rows, channels].astype(np.int64)
        results = layer.epilogue.apply(sums.astype(np.int64), operand, channels)
        self._view(layer.destination, layer.rows)[rows, channels] = results

    def _vector(self) -> None:
        layer = self._layer
        if isinstance(layer, Pool):
            source, destination = layer.source, layer.destination
            images = self._view(Rows(source), source.rows).reshape(source.shape)
            self._view(Rows(destination), destination.rows)[:] = pool(layer, images).reshape(
                destination.rows, destination.channels
            )
        elif isinstance(layer, CellUpdate):
            gates = self._view(Rows(layer.gates), layer.gates.rows)
            cell = self._view(Rows(layer.cell), layer.cell.rows)
            new, hidden = update_cell(layer, gates.astype(np.int64), cell.astype(np.int64))
            cell[:] = new
            self._view(layer.destination, layer.gates.rows)[:] = hidden

    def _view(self, rows: Rows, count: int) -> NDArray[Any]:
        """`count` rows [count, channels] of a value in the unified buffer, not copied."""
        value = rows.value
        return np.ndarray(
            (count, value.channels),
            value.dtype,
            self._buffer.data,
            self._program.addresses[value.name] + rows.first * value.row_bytes,
            (rows.step * value.row_bytes, value.dtype.itemsize),
        )


def pool(layer: Pool, images: NDArray[np.uint8]) -> NDArray[np.integer]:
    """The pooled images [N, H, W, C]."""
    patches = layer.window.patches(images)
    pooled: NDArray[np.integer]
    if layer.average is None:
        pooled = np.maximum(patches.max(axis=(3, 4)), layer.low)
    else:
        sums = patches.sum(axis=(3, 4), dtype=np.int64)
        flat = layer.average.apply(sums.reshape(-1, 1), None, slice(None))
        pooled = np.maximum(flat, layer.low).reshape(sums.shape)
    return pooled
