"""An LSTM of quantized Linears, as layers of an integer network.

The products with the inputs are made for all steps at once and kept in 16 bits; in each step, the
products with the previous result are added to them, functions are looked up in tables, and the
activation unit updates the cell. The TPU's paper counts such vector operations, but does not
describe them: their formats are assumptions (trainer.hardware.tpu.arithmetic).
"""

from dataclasses import replace
from typing import cast

import numpy as np
from torch import nn

from trainer.compress.recurrent import LinearLSTM
from trainer.hardware.tpu.arithmetic import (
    FIXED_POINT,
    UNIT,
    Grid,
    function_table,
    requantize,
    sigmoid,
    to_fixed_point,
)
from trainer.hardware.tpu.network import CellUpdate, Layer, Product, Rows, Value
from trainer.hardware.tpu.quantized import quantized_layer

_SHORT = np.dtype(np.int16)
_FIXED_POINT_GRID = Grid(FIXED_POINT, 0)
_UNIT_GRID = Grid(UNIT, 0)
_LARGEST = (1 << 15) - 1


def lower_lstm(
    name: str, lstm: LinearLSTM, source: Value
) -> tuple[list[Layer], Value, dict[str, int]]:
    """The layers of an LSTM.

    Args:
        name: Of the module.
        lstm: With quantized Linears.
        source: [N, T, input] if `lstm.batch_first`, else [T, N, input].

    Returns:
        The layers, the outputs of the last one for all steps, and the values that must be filled
        with an integer before: the first h and c.

    Raises:
        ConfigError: A Linear of the LSTM is not quantized.
    """
    layers: list[Layer] = []
    initial: dict[str, int] = {}
    for number, layer in enumerate(lstm.layers):
        made, source, start = _lower_layer(f"{name}.{number}", layer, source, lstm.batch_first)
        layers += made
        initial |= start
    return layers, source, initial


def _lower_layer(
    name: str, layer: nn.Module, source: Value, batch_first: bool
) -> tuple[list[Layer], Value, dict[str, int]]:
    first, second = source.shape[:2]
    samples, steps = (first, second) if batch_first else (second, first)
    ih = quantized_layer(f"{name}.ih", cast(nn.Linear, layer.ih))
    hh = quantized_layer(f"{name}.hh", cast(nn.Linear, layer.hh))
    width = len(ih.weights)
    hidden = width // 4
    grid = hh.input_grid
    inputs = Value(f"{name}.inputs", (first, second, width), _SHORT, _FIXED_POINT_GRID)
    outputs = Value(f"{name}.outputs", (first, second, hidden), source.dtype, grid)
    start = Value(f"{name}.start", (samples, hidden), source.dtype, grid)
    cell = Value(f"{name}.cell", (samples, hidden), np.dtype(np.int32))
    gates = Value(f"{name}.gates", (samples, width), _SHORT, _UNIT_GRID)
    made: list[Layer] = [
        Product(
            name=f"{name}.ih",
            source=Rows(source),
            destination=Rows(inputs),
            rows=source.rows,
            weights=ih.weights[None, :, None],
            epilogue=to_fixed_point(ih.sum_scales(source.grid), ih.bias, ih.zero_sums(source.grid)),
        )
    ]
    tanh = function_table(np.tanh, _UNIT_GRID, -_LARGEST, _LARGEST)
    epilogue = replace(
        to_fixed_point(hh.sum_scales(grid), hh.bias, hh.zero_sums(grid), operand=_FIXED_POINT_GRID),
        tables=np.stack((function_table(sigmoid, _UNIT_GRID, 0, _LARGEST), tanh)),
        table_of=np.repeat([0, 0, 1, 0], hidden),  # gates i, f, g, o
    )
    zeros = np.zeros(hidden, np.int64)
    to_grid = requantize(np.full(hidden, UNIT * UNIT), np.zeros(hidden), zeros, grid)
    weights = hh.weights[None, :, None]
    for step in range(steps):
        previous = _step(outputs, step - 1, batch_first) if step else Rows(start)
        made += [
            Product(
                name=f"{name}.hh, step {step}",
                source=previous,
                destination=Rows(gates),
                rows=samples,
                weights=weights,
                epilogue=epilogue,
                operand=_step(inputs, step, batch_first),
            ),
            CellUpdate(
                name=f"{name}.cell, step {step}",
                gates=gates,
                cell=cell,
                destination=_step(outputs, step, batch_first),
                tanh=tanh,
                epilogue=to_grid,
            ),
        ]
    return made, outputs, {start.name: grid.zero_point, cell.name: 0}


def _step(value: Value, step: int, batch_first: bool) -> Rows:
    """The rows of one time step."""
    second = value.shape[1]
    return Rows(value, step, second) if batch_first else Rows(value, step * second)
