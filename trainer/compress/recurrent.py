"""Recurrent networks built from Linear layers, so that their matrix products can be quantized.

Each class here computes what the torch.nn layer that it is made from computes, up to rounding, one
time step after the other. Layer n has the Linears `layers.n.ih`, applied to its inputs, and
`layers.n.hh`, applied to its hidden state.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

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
        """Raises TypeError for a packed sequence in training, RuntimeError for other shapes."""
        if isinstance(input, PackedSequence):
            return self._packed(input, hx)
        if input.ndim not in (2, 3):
            raise RuntimeError(f"an input of {list(input.shape)}: it must have 2 or 3 dimensions")
        batched = input.ndim == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
        if hx is None:
            shape = (len(self.layers), x.shape[1], self.hidden_size)
            initial: State = (x.new_zeros(shape),) * self.states
        else:
            initial = (hx,) if self.states == 1 else tuple(hx)
            initial = initial if batched else tuple(part.unsqueeze(1) for part in initial)
            self._check_state(initial, x.shape[1])
        ends: list[State] = []
        layers: list[Any] = list(self.layers)
        for number, layer in enumerate(layers):
            if number:
                x = dropout(x, self.dropout, self.training)
            x, end = layer.run(x, tuple(part[number] for part in initial), self.step)
            ends.append(end)
        final = tuple(torch.stack(parts) for parts in zip(*ends, strict=True))
        if not batched:
            x, final = x.squeeze(1), tuple(part.squeeze(1) for part in final)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return x, (final[0] if self.states == 1 else final)

    def _check_state(self, state: State, sequences: int) -> None:
        shape = (len(self.layers), sequences, self.hidden_size)
        for part in state:
            if part.shape != shape:
                raise RuntimeError(
                    f"a state of {list(part.shape)}: it must be [layers, N, hidden], here "
                    f"{list(shape)}"
                )

    def _packed(self, packed: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        """Each sequence by itself: correct, but slower than a padded batch."""
        if self.training:
            raise TypeError(
                f"a quantized {self.source.__name__} is trained with padded tensors, not packed "
                "sequences"
            )
        sequences = unpack_sequence(packed)
        if hx is not None:
            self._check_state((hx,) if self.states == 1 else tuple(hx), len(sequences))
        outputs, ends = [], []
        for number, sequence in enumerate(sequences):
            state = None
            if hx is not None:
                state = hx[:, number] if self.states == 1 else tuple(x[:, number] for x in hx)
            output, end = self.forward(sequence, state)
            outputs.append(output)
            ends.append((end,) if self.states == 1 else end)
        order = range(len(outputs)) if packed.sorted_indices is None else packed.sorted_indices
        data = pack_sequence([outputs[number] for number in order]).data
        final = tuple(torch.stack(parts, 1) for parts in zip(*ends, strict=True))
        return packed._replace(data=data), (final[0] if self.states == 1 else final)


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
        self, inputs: Tensor, state: State, step: Callable[[Tensor, Tensor, State], State]
    ) -> tuple[Tensor, State]:
        """Run over all steps; products with the inputs are computed for all at once."""
        outputs = []
        weight = self.hh.weight  # read once for all steps: a trained one is computed at each use
        for gates in self.ih(inputs).unbind():
            state = step(gates, self.hh(state[0], weight), state)
            outputs.append(state[0])
        return torch.stack(outputs), state


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
