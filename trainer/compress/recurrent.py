"""Recurrent networks built from Linear layers, so that their matrix products can be quantized.

Each class here computes what the torch.nn layer that it is made from computes, up to rounding, one
time step after the other. Layer n has the Linears `layers.n.ih`, applied to its inputs, and
`layers.n.hh`, applied to its hidden state.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence

State = tuple[Tensor, ...]
"""Hidden state [N, hidden] of one layer; for an LSTM followed by its cell state."""

# Attributes of a recurrent layer that models read, to build a state for instance.
_SETTINGS = ("input_size", "num_layers", "bidirectional", "proj_size")


class LinearRecurrent(nn.Module):
    """Base class: layers in sequence, with dropout between them.

    Input [N, T, input] (batch_first) or [T, N, input] -> output of the last layer in the same
    order, and the final state, [layers, N, hidden] or a tuple of such tensors.
    """

    source: type[nn.RNNBase]
    """The torch.nn class that it replaces."""

    states = 1
    """Number of tensors in the state."""

    def __init__(self, source: nn.RNNBase) -> None:
        """Take over the weights of `source`.

        Raises:
            ValueError: `source` is of another class, bidirectional or projected.
        """
        super().__init__()
        if not self.accepts(source):
            raise ValueError(f"a {type(source).__name__} cannot be built from Linear layers here")
        for name in _SETTINGS:
            setattr(self, name, getattr(source, name))
        self.batch_first = source.batch_first
        self.dropout = float(source.dropout)
        self.hidden_size = source.hidden_size
        self.layers = nn.ModuleList(_Layer(source, number) for number in range(source.num_layers))

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether a module can be replaced. A subclass cannot: it may compute something else."""
        return (
            type(module) is cls.source
            and isinstance(module, nn.RNNBase)
            and not module.bidirectional
            and not module.proj_size
        )

    def step(self, inputs: Tensor, hidden: Tensor, state: State) -> State:
        """Compute the next state of one layer.

        Args:
            inputs: Product of the inputs with the weights of all gates, [N, gates * hidden].
            hidden: The same product of the hidden state.
            state: Of the step before.
        """
        raise NotImplementedError

    def flatten_parameters(self) -> None:
        """Does nothing: models call this method of torch's layers before they run them."""

    def forward(self, input: Any, hx: Any = None) -> tuple[Any, Any]:
        """Raises RuntimeError for a wrong shape."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if input.ndim not in (2, 3):
            raise RuntimeError(f"an input of {list(input.shape)}: it must have 2 or 3 dimensions")
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if hx is not None and not batched:
            hx = hx.unsqueeze(1) if self.states == 1 else tuple(part.unsqueeze(1) for part in hx)
        x, final = self._run(x, self._initial(hx, x, x.shape[1]))
        if not batched:
            x, final = x.squeeze(1), tuple(part.squeeze(1) for part in final)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, (final[0] if self.states == 1 else final)

    def _packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """As `forward`; the sequences are sorted by length, the longest first."""
        sizes: list[int] = packed.batch_sizes.tolist()
        state = self._initial(hx, packed.data, sizes[0])
        if packed.sorted_indices is not None:
            state = tuple(part[:, packed.sorted_indices] for part in state)
        data, final = self._run(packed.data, state, sizes)
        if packed.unsorted_indices is not None:
            final = tuple(part[:, packed.unsorted_indices] for part in final)
        return packed._replace(data=data), (final[0] if self.states == 1 else final)

    def _run(
        self, x: Tensor, initial: State, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, State]:
        """Run all layers.

        Args:
            x: [T, N, input]; with `sizes`, the time steps one after another, [sum of sizes, input].
            initial: Parts [layers, N, hidden].
            sizes: The number of sequences in each time step: the first ones. It never grows.

        Returns:
            The output of the last layer, in the order of `x`, and the final state.
        """
        ends: list[State] = []
        layers: list[Any] = list(self.layers)
        for number, layer in enumerate(layers):
            if number:
                x = dropout(x, self.dropout, self.training)
            x, end = layer.run(x, tuple(part[number] for part in initial), self.step, sizes)
            ends.append(end)
        return x, tuple(torch.stack(parts) for parts in zip(*ends, strict=True))

    def _initial(self, hx: Any, x: Tensor, sequences: int) -> State:
        """The state before the first step: `hx`, or zeros of the type of `x`."""
        if hx is None:
            return (x.new_zeros(len(self.layers), sequences, self.hidden_size),) * self.states
        state = (hx,) if self.states == 1 else tuple(hx)
        self._check_state(state, sequences)
        return state

    def _check_state(self, state: State, sequences: int) -> None:
        shape = (len(self.layers), sequences, self.hidden_size)
        for part in state:
            if part.shape != shape:
                raise RuntimeError(
                    f"a state of {list(part.shape)}: it must be [layers, N, hidden], here "
                    f"{list(shape)}"
                )


class LinearLSTM(LinearRecurrent):
    """An nn.LSTM built from Linear layers; its state is (h, c)."""

    source = nn.LSTM
    states = 2

    def step(self, inputs: Tensor, hidden: Tensor, state: State) -> State:
        i, f, g, o = (inputs + hidden).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class LinearGRU(LinearRecurrent):
    """An nn.GRU built from Linear layers."""

    source = nn.GRU

    def step(self, inputs: Tensor, hidden: Tensor, state: State) -> State:
        (r, z, n), (hidden_r, hidden_z, hidden_n) = inputs.chunk(3, -1), hidden.chunk(3, -1)
        update = (z + hidden_z).sigmoid()
        new = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
        return (new + update * (state[0] - new),)


class LinearRNN(LinearRecurrent):
    """An nn.RNN built from Linear layers."""

    source = nn.RNN

    def __init__(self, source: nn.RNNBase) -> None:
        super().__init__(source)
        self.nonlinearity = source.nonlinearity

    def step(self, inputs: Tensor, hidden: Tensor, state: State) -> State:
        total = inputs + hidden
        return (total.relu() if self.nonlinearity == "relu" else total.tanh(),)


class _Layer(nn.Module):
    """The Linears of one layer."""

    def __init__(self, source: nn.RNNBase, number: int) -> None:
        super().__init__()
        self.ih = _linear(nn.Linear, source, f"ih_l{number}")
        self.hh = _linear(_Recurrent, source, f"hh_l{number}")

    def run(
        self,
        inputs: Tensor,
        state: State,
        step: Callable[[Tensor, Tensor, State], State],
        sizes: Sequence[int] | None,
    ) -> tuple[Tensor, State]:
        """Run over all steps; products with the inputs are computed for all at once."""
        outputs, ended = [], []
        weight = self.hh.weight  # read once for all steps: a trained one is computed at each use
        products = self.ih(inputs)
        for gates in products.unbind() if sizes is None else products.split(sizes):
            if sizes is not None and len(gates) < len(state[0]):  # a file for ONNX keeps any size
                ended.append(tuple(part[len(gates) :] for part in state))
                state = tuple(part[: len(gates)] for part in state)
            state = step(gates, self.hh(state[0], weight), state)
            outputs.append(state[0])
        if ended:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(ended), strict=True))
        return torch.stack(outputs) if sizes is None else torch.cat(outputs), state


class _Recurrent(nn.Linear):
    """A Linear whose caller may have read its weight before, and passes it."""

    def forward(self, input: Tensor, weight: Tensor | None = None) -> Tensor:
        return linear(input, self.weight if weight is None else weight, self.bias)


def _linear(kind: type[nn.Linear], source: nn.RNNBase, suffix: str) -> nn.Linear:
    weight = getattr(source, f"weight_{suffix}")
    outputs, inputs = weight.shape
    with torch.device("meta"):
        made = kind(inputs, outputs, source.bias)
    made.weight = weight
    if source.bias:
        made.bias = getattr(source, f"bias_{suffix}")
    return made
