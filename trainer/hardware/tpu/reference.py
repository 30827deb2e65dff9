"""The results of an integer network without a TPU: whole layers, in 64-bit integers.

It shares the network and its rounding with the executor, but neither tiles nor memories: what both
compute must be equal, bit for bit.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.hardware.tpu.executor import pool
from trainer.hardware.tpu.network import CellUpdate, Network, Pool, Product, Rows, update_cell

_Values = dict[str, NDArray[np.integer]]  # [rows, channels]


def reference(network: Network, integers: NDArray[np.uint8]) -> NDArray[np.integer]:
    """From the integers of the network's input to those of its output."""
    values: _Values = {network.input.name: integers.reshape(-1, network.input.channels)}
    for layer in network.layers:
        match layer:
            case Product():
                _multiply(layer, values, network)
            case Pool():
                images = values[layer.source.name].reshape(layer.source.shape)
                result = pool(layer, images.astype(np.uint8))
                values[layer.destination.name] = result.reshape(-1, layer.destination.channels)
            case CellUpdate():
                cell = _read(Rows(layer.cell), layer.cell.rows, values, network)
                gates = values[layer.gates.name].astype(np.int64)
                new, hidden = update_cell(layer, gates, cell)
                values[layer.cell.name] = new
                _write(layer.destination, hidden, values)
    return values[network.output.name].reshape(network.output.shape)


def _multiply(layer: Product, values: _Values, network: Network) -> None:
    source = layer.source.value
    if layer.window is None:
        rows = _read(layer.source, layer.rows, values, network)[:, None, :]
    else:
        images = values[source.name].reshape(source.shape).astype(np.uint8)
        patches = layer.window.patches(images)
        rows = patches.reshape(layer.rows, -1, source.channels).astype(np.int64)
    groups = np.split(rows, layer.groups, axis=2)
    weights = layer.weights.astype(np.int64)
    sums = [np.einsum("rkc,okc->ro", x, w) for x, w in zip(groups, weights, strict=True)]
    operand = None
    if layer.operand is not None:
        operand = _read(layer.operand, layer.rows, values, network)
    result = layer.epilogue.apply(np.concatenate(sums, axis=1), operand, slice(None))
    _write(layer.destination, result, values)


def _read(rows: Rows, count: int, values: _Values, network: Network) -> NDArray[np.int64]:
    value = rows.value
    shape = (value.rows, value.channels)
    if value.name not in values:
        values[value.name] = np.full(shape, network.initial[value.name], np.int64)
    # A Linear after a flatten reads all channels of an image as a row.
    return values[value.name].reshape(shape)[rows.first :: rows.step][:count].astype(np.int64)


def _write(rows: Rows, result: NDArray[np.integer], values: _Values) -> None:
    value = rows.value
    if value.name not in values:
        values[value.name] = np.zeros((value.rows, value.channels), np.int64)
    values[value.name][rows.first :: rows.step][: len(result)] = result
