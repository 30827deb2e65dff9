"""Counts what one forward pass costs: multiply-accumulates by weights that are not zero."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trainer.compress.attention import unfused_attention
from trainer.data.tree import call_with, tensors

_aten = torch.ops.aten

# The operands that are multiplied, by their positions among the arguments of each operator.
_OPERANDS: dict[Any, tuple[int, ...]] = {
    _aten.mm: (0, 1),
    _aten.addmm: (1, 2),
    _aten.bmm: (0, 1),
    _aten.baddbmm: (1, 2),
    _aten._scaled_mm: (0, 1),
    _aten.convolution: (0, 1),
    _aten._convolution: (0, 1),
    _aten.mv: (0, 1),
    _aten.addmv: (1, 2),
    _aten.dot: (0, 1),
    _aten.vdot: (0, 1),
    _aten._trilinear: (0, 1, 2),
}


@torch.no_grad()
def macs(model: nn.Module, sample: Any, call: Callable[[nn.Module, Any], Any] = call_with) -> int:
    """Count the multiply-accumulates of matrix products and convolutions for one sample.

    Every operator that torch runs is looked at (as `torch.utils.flop_counter` does), whatever layer
    calls it: attention, transposed convolutions and products of two activations included. An
    operand that does not depend on the sample is a weight, and only its nonzero values count. A
    weight of an LSTM, GRU or RNN counts once per time step of each sequence. Elementwise
    operations, and products that do not depend on the sample, are free.

    Args:
        model: With plain weights; its mode is restored afterwards.
        sample: Inputs [1, ...], on the model's device; several in a tuple or mapping.
        call: Calls the model with the sample.
    """
    counter = _Counter(sample)
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        for module in recurrent:
            before = module.register_forward_pre_hook(counter.enter_recurrent, with_kwargs=True)
            after = module.register_forward_hook(counter.leave_recurrent, always_call=True)
            stack.callback(before.remove)
            stack.callback(after.remove)
        stack.enter_context(unfused_attention())
        # float16 would round small weights to zero.
        device = next(tensors(sample)).device.type
        stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(counter)
        model.eval()
        call(model, sample)
    return counter.total


class _Counter(TorchDispatchMode):
    """Counts the products of the operators that run while it is active."""

    def __init__(self, sample: Any) -> None:
        super().__init__()
        self.total = 0
        self._in_recurrent = 0
        # Memory that depends on the sample. A weak reference keeps the address from being reused.
        self._dependent: dict[int, StorageWeakRef] = {}
        for tensor in tensors(sample):
            self._mark(tensor)

    def enter_recurrent(self, module: nn.RNNBase, args: tuple[Any, ...], named: Any) -> None:
        """Forward pre-hook: count the weights of a recurrent layer, which run as one operator."""
        steps = _time_steps(args[0] if args else named["input"])
        weights = [p for name, p in module.named_parameters() if name.startswith("weight")]
        self.total += steps * sum(int(weight.count_nonzero()) for weight in weights)
        self._in_recurrent += 1

    def leave_recurrent(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook: the end of `enter_recurrent`."""
        self._in_recurrent -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = func._overloadpacket
        if kind not in _OPERANDS:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if any(self._depends(leaf) for leaf in tree_leaves((args, kwargs))):
            for leaf in tree_leaves((result, _written(func, args, kwargs))):
                self._mark(leaf)
            if kind in _OPERANDS and not self._in_recurrent:
                self.total += self._count(kind, args, result)
        return result

    def _count(self, kind: Any, args: tuple[Any, ...], result: Tensor) -> int:
        """Products of one operator, without those by a weight that is zero."""
        operands = [args[position] for position in _OPERANDS[kind]]
        if kind in _FORMULAS:
            count = _FORMULAS[kind](args)
        else:
            count = flop_registry[kind](*args, out_val=result) // 2
        for operand in operands:
            if not self._depends(operand) and operand.numel():
                # Each value takes part in equally many products.
                count = count * int(_values(operand).count_nonzero()) // operand.numel()
        return count

    def _mark(self, value: Any) -> None:
        """Note that a tensor depends on the sample."""
        if isinstance(value, Tensor):
            reference = StorageWeakRef(_values(value).untyped_storage())
            self._dependent[reference.cdata] = reference

    def _depends(self, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        return _values(value).untyped_storage()._cdata in self._dependent


def _vector_product(args: tuple[Any, ...]) -> int:
    """Of a matrix or a vector, which is the last but one argument, with a vector."""
    return int(args[-2].numel())


def _trilinear(args: tuple[Any, ...]) -> int:
    """Products of three operands, which get new dimensions and are broadcast."""
    shapes = []
    for operand, dimensions in zip(args[:3], args[3:6], strict=True):
        for dimension in sorted(dimensions):
            operand = operand.unsqueeze(dimension)
        shapes.append(operand.shape)
    return prod(torch.broadcast_shapes(*shapes))


_FORMULAS: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    _aten.mv: _vector_product,
    _aten.addmv: _vector_product,
    _aten.dot: _vector_product,
    _aten.vdot: _vector_product,
    _aten._trilinear: _trilinear,
}


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operator changes in place."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[position] if position < len(args) else kwargs.get(argument.name)


def _values(tensor: Tensor) -> Tensor:
    """The values that are in memory: of a sparse tensor, those of its entries."""
    if tensor.layout == torch.sparse_coo:
        return tensor._values()
    return tensor if tensor.layout == torch.strided else tensor.values()


def _time_steps(inputs: Tensor | PackedSequence) -> int:
    """Of all sequences that a recurrent layer gets for the sample."""
    values = inputs.data if isinstance(inputs, PackedSequence) else inputs
    return prod(values.shape[:-1])
