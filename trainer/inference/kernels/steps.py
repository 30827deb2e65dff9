"""Time steps of recurrent layers whose recurrent weight is compressed, in one call.

The equations are those of torch.nn.LSTM and torch.nn.GRU.
"""

import numpy as np

from trainer.compress.jit import jit
from trainer.inference.kernels.multiply import multiply_columns, multiply_rows

_ONE, _TWO = np.float32(1), np.float32(2)
_LOG2_E = np.float32(1.44269504)
# ln 2 in two parts, the first exact in few bits, and the coefficients of exp between -ln 2 / 2 and
# ln 2 / 2, from Cephes (Moshier), expf.c: the error is about 1e-7.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_P0, _P1, _P2 = (
    np.float32(1.9875691500e-4),
    np.float32(1.3981999507e-3),
    np.float32(8.3334519073e-3),
)
_P3, _P4, _P5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0e-1)
_LARGEST = np.float32(87)  # exp of this value, and its inverse, are normal numbers


@jit
def _exp(x):  # type: ignore[no-untyped-def]
    """exp without branches, so that loops over it become vector instructions."""
    x = min(max(x, -_LARGEST), _LARGEST)
    power = np.rint(x * _LOG2_E)
    rest = x - power * _LN2_HIGH - power * _LN2_LOW
    value = (((_P0 * rest + _P1) * rest + _P2) * rest + _P3) * rest
    value = ((value + _P4) * rest + _P5) * rest * rest + rest + _ONE
    return value * np.int32((np.int32(power) + 127) << 23).view(np.float32)


@jit
def _sigmoid(x):  # type: ignore[no-untyped-def]
    return _ONE / (_ONE + _exp(-x))


@jit
def _tanh(x):  # type: ignore[no-untyped-def]
    return _ONE - _TWO / (_exp(_TWO * x) + _ONE)


@jit
def run_lstm(entries, pointers, starts, bits, table, by_columns, gates, bias, h, c, out):  # type: ignore[no-untyped-def]
    """All steps of an LSTM layer.

    Args:
        entries, pointers, starts, bits, table: The recurrent weight [4 hidden, hidden].
        by_columns: Whether it is in the order of columns.
        gates: [T, N, 4 hidden], the products of the inputs, with their biases; overwritten.
        bias: [4 hidden], of the recurrent products.
        h, c: [N, hidden], the state, which is updated.
        out: [T, N, hidden], receives h after each step.
    """
    steps, samples, hidden = out.shape
    blocks = len(starts) - 1
    for t in range(steps):
        sums = gates[t]
        for n in range(samples):
            for i in range(4 * hidden):
                sums[n, i] += bias[i]
        if by_columns:
            multiply_columns(entries, pointers, starts, bits, table, h, sums, 0, blocks)
        else:
            multiply_rows(entries, pointers, starts, bits, table, h, sums, 0, 4 * hidden)
        for n in range(samples):
            for i in range(hidden):
                cell = _sigmoid(sums[n, hidden + i]) * c[n, i]
                cell += _sigmoid(sums[n, i]) * _tanh(sums[n, 2 * hidden + i])
                c[n, i] = cell
                h[n, i] = _sigmoid(sums[n, 3 * hidden + i]) * _tanh(cell)
                out[t, n, i] = h[n, i]


@jit
def run_gru(entries, pointers, starts, bits, table, by_columns, gates, bias, h, c, out):  # type: ignore[no-untyped-def]
    """All steps of a GRU layer; arguments as `run_lstm`, with three gates. `c` is not used."""
    steps, samples, hidden = out.shape
    blocks = len(starts) - 1
    sums = np.empty((samples, 3 * hidden), np.float32)
    for t in range(steps):
        for n in range(samples):
            sums[n] = bias
        if by_columns:
            multiply_columns(entries, pointers, starts, bits, table, h, sums, 0, blocks)
        else:
            multiply_rows(entries, pointers, starts, bits, table, h, sums, 0, 3 * hidden)
        for n in range(samples):
            for i in range(hidden):
                reset = _sigmoid(gates[t, n, i] + sums[n, i])
                update = _sigmoid(gates[t, n, hidden + i] + sums[n, hidden + i])
                new = _tanh(gates[t, n, 2 * hidden + i] + reset * sums[n, 2 * hidden + i])
                h[n, i] = new + update * (h[n, i] - new)
                out[t, n, i] = h[n, i]
