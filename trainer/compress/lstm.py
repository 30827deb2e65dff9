"""nn.LSTM made of Linear layers, so that its matrix products can be quantized like any other."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear


class LinearLSTM(nn.Module):
    """Computes what the nn.LSTM that it is made from computes, up to rounding, step by step.

    Input [N, T, input] (batch_first) or [T, N, input] -> output of the last layer in the same
    order, and the final (h, c), [layers, N, hidden] each.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        """Takes over the weights. Raises ValueError where `convertible` says no."""
        super().__init__()
        if not convertible(lstm):
            raise ValueError("a bidirectional or projected LSTM cannot be made of Linear layers")
        self.batch_first = lstm.batch_first
        self.dropout = float(lstm.dropout)
        self.hidden_size = lstm.hidden_size
        self.layers = nn.ModuleList(_Layer(lstm, number) for number in range(lstm.num_layers))

    def forward(
        self, inputs: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Raises TypeError for a packed sequence."""
        if not isinstance(inputs, Tensor):
            raise TypeError("a quantized LSTM takes a padded tensor, not a packed sequence")
        x = inputs.transpose(0, 1) if self.batch_first else inputs
        if state is None:
            zero = x.new_zeros(len(self.layers), x.shape[1], self.hidden_size)
            state = zero, zero
        ends: list[tuple[Tensor, Tensor]] = []
        for number, layer in enumerate(self.layers):
            if number:
                x = dropout(x, self.dropout, self.training)
            x, end = layer(x, state[0][number], state[1][number])
            ends.append(end)
        hidden, cell = (torch.stack(parts) for parts in zip(*ends, strict=True))
        return (x.transpose(0, 1) if self.batch_first else x), (hidden, cell)


class _Layer(nn.Module):
    """One layer: products with the inputs are made for all steps at once."""

    def __init__(self, lstm: nn.LSTM, number: int) -> None:
        super().__init__()
        self.ih = _linear(nn.Linear, lstm, f"ih_l{number}")
        self.hh = _linear(_Recurrent, lstm, f"hh_l{number}")

    def forward(self, inputs: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        outputs = []
        weight = self.hh.weight  # once for all steps: while it is trained, it is computed
        for gates in self.ih(inputs).unbind():
            i, f, g, o = (gates + self.hh(h, weight)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs), (h, c)


class _Recurrent(nn.Linear):
    """A Linear that may be given its own weight, where its caller has read it before."""

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        return linear(input, self.weight if weight is None else weight, self.bias)


def convertible(module: Any) -> bool:
    """Whether `LinearLSTM` can take the place of a module: a subclass may compute otherwise."""
    return type(module) is nn.LSTM and not module.bidirectional and not module.proj_size


def _linear(kind: type[nn.Linear], lstm: nn.LSTM, suffix: str) -> nn.Linear:
    weight = getattr(lstm, f"weight_{suffix}")
    outputs, inputs = weight.shape
    with torch.device("meta"):
        made = kind(inputs, outputs, lstm.bias)
    made.weight = weight
    if lstm.bias:
        made.bias = getattr(lstm, f"bias_{suffix}")
    return made
