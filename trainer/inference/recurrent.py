"""LSTM and GRU layers with compressed gates."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compress.recurrent import LinearGRU, LinearLSTM, LinearRecurrent, State
from trainer.inference.kernels.steps import run_gru, run_lstm
from trainer.inference.layers import Choice, LayerKernel, check_input
from trainer.inference.matrix import CompressedMatrix
from trainer.inference.products import CompressedLinear

FUSED: dict[type[nn.Module], type[LinearRecurrent]] = {nn.LSTM: LinearLSTM, nn.GRU: LinearGRU}
"""The layers of torch whose steps a kernel computes, and the classes that run their layers."""


@dataclass(frozen=True)
class FusedSteps:
    """One layer with compressed weights: all time steps in one call, on one thread."""

    kind: type[nn.Module]
    inputs: CompressedLinear
    recurrent: CompressedMatrix

    @property
    def nbytes(self) -> int:
        """Bytes of both weights in memory."""
        return self.inputs.nbytes + self.recurrent.nbytes

    def __call__(self, x: Tensor, state: State, biases: tuple[Tensor, Tensor]) -> Any:
        """
        Args:
            x: [T, N, inputs].
            state: The hidden state [N, hidden], and the cell state of an LSTM.
            biases: [gates * hidden], of the products of the inputs and of the state.
        """
        m = self.recurrent
        gates = self.inputs(x, biases[0])
        h = state[0].clone(memory_format=torch.contiguous_format)
        c = state[1].clone(memory_format=torch.contiguous_format) if len(state) > 1 else h
        out = x.new_empty(*x.shape[:2], m.shape[1])
        run = run_lstm if self.kind is nn.LSTM else run_gru
        tensors = (t.numpy() for t in (gates, biases[1], h, c, out))
        run(m.entries, m.pointers, m.starts, m.bits, m.table, m.order == "columns", *tensors)
        return out, ((h, c) if len(state) > 1 else (h,))


@dataclass(frozen=True)
class DenseSteps:
    """One layer with dense weights, by torch."""

    module: nn.RNNBase

    @property
    def nbytes(self) -> int:
        """Bytes of both weights in memory."""
        return sum(p.nbytes for n, p in self.module.named_parameters() if n.startswith("weight"))

    def __call__(self, x: Tensor, state: State, biases: tuple[Tensor, Tensor]) -> Any:
        parts = tuple(part.unsqueeze(0) for part in state)
        out, end = self.module(x, parts if len(parts) > 1 else parts[0])
        ends = end if len(parts) > 1 else (end,)
        return out, tuple(part.squeeze(0) for part in ends)


class CompiledSteps(Choice):
    """One layer of an nn.LSTM or nn.GRU."""

    input_bias: Tensor
    recurrent_bias: Tensor

    def __init__(
        self,
        about: LayerKernel,
        kind: type[nn.LSTM] | type[nn.GRU],
        candidates: Mapping[str, FusedSteps | None],
        chosen: str | None,
        biases: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """
        Args:
            about: The description before the choice.
            kind: nn.LSTM or nn.GRU.
            candidates: The kernels by name; None: `dense`, which is built when it is needed.
            chosen: The kernel to use without measuring; None: measure at the first call.
            biases: Of the products of the inputs and of the state.
        """
        super().__init__(about)
        self.kind = kind
        names = ("input_bias", "recurrent_bias")
        for name, bias in zip(names, biases, strict=True):
            value = torch.zeros(about.shape[0]) if bias is None else bias.detach().clone()
            self.register_buffer(name, value)
        self.start(candidates, chosen)

    def candidate(self, name: str) -> DenseSteps:
        """The layer of torch."""
        source = next(of for of in self._candidates.values() if of is not None)
        hidden = source.recurrent.shape[1]
        module: Any = self.kind(source.inputs.matrix.shape[1], hidden)
        with torch.no_grad():
            module.weight_ih_l0.copy_(source.inputs.dense())
            module.weight_hh_l0.copy_(source.recurrent.dense())
            module.bias_ih_l0.copy_(self.input_bias)
            module.bias_hh_l0.copy_(self.recurrent_bias)
        return DenseSteps(module.requires_grad_(False).eval())

    def run(
        self,
        inputs: Tensor,
        state: State,
        step: Callable[..., State],
        sizes: Sequence[int] | None,
    ) -> Any:
        """Run over all steps: inputs [T, N, inputs] -> outputs [T, N, hidden], and the last state.

        Args:
            step: Not used: the kernels compute the same.
            sizes: As for `LinearRecurrent`: inputs and outputs are of packed sequences then.
        """
        if sizes is not None:
            return self._one_by_one(inputs, state, step, sizes)
        for tensor in (inputs, *state):
            check_input(tensor)
        product = self.product or self.choose(inputs, state)
        return self.call(product, inputs, state)

    def _one_by_one(
        self, inputs: Tensor, state: State, step: Callable[..., State], sizes: Sequence[int]
    ) -> Any:
        starts = [end - size for end, size in zip(itertools.accumulate(sizes), sizes, strict=True)]
        outputs, ends = inputs.new_empty(len(inputs), state[0].shape[1]), []
        for number in range(sizes[0]):
            rows = [
                start + number for start, size in zip(starts, sizes, strict=True) if size > number
            ]
            own = tuple(part[number : number + 1] for part in state)
            out, end = self.run(inputs[rows].unsqueeze(1), own, step, None)
            outputs[rows] = out.squeeze(1)
            ends.append(end)
        return outputs, tuple(torch.cat(parts) for parts in zip(*ends, strict=True))

    def call(self, product: Any, x: Tensor, state: State) -> Any:
        return product(x, state, (self.input_bias, self.recurrent_bias))
