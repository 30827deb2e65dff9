"""Weights that are computed from what is learnt instead: masked, packed, shared, quantized.

A `Compression` sits on a weight through torch.nn.utils.parametrize, so that every use of
`module.weight` gets the dense weight while the optimizer, the reducer and the checkpoint see only
what is learnt. `install` and `fold` (trainer.compress.install) put them on a model and turn them
back into plain parameters.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from trainer.compress.codebooks import Codebook
from trainer.compress.quantize import WeightQuantizer


class Compression(nn.Module):
    """A weight that is computed from a trainable tensor, which need not have its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[RemovableHandle] = []

    def initial_trainable(self, weight: Tensor) -> Tensor:
        """The first value of the trainable tensor, for `weight` in its shape."""
        raise NotImplementedError

    def forward(self, trainable: Tensor) -> Tensor:
        """The weight, differentiable with respect to `trainable`."""
        raise NotImplementedError

    def before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook of a module that uses the weight several times."""

    def after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook: the end of `before_forward`."""


class Materialized(Compression):
    """A weight that is written from a trainable tensor into one persistent buffer.

    Writing into the same memory again costs a tenth of making a fresh dense tensor each step. It is
    done at every use, without asking whether the trainable tensor changed: fused optimizers and
    broadcasts change tensors without raising their version, so any such cache can go stale
    silently. The write does not count as an in-place change for autograd either, since between a
    forward pass and its backward it writes what is there already. (So autograd cannot notice an
    optimizer step between the two, as it cannot with any fused optimizer.)

    The buffer is one-dimensional, in the order of the weight's memory: a later
    `model.to(memory_format=...)` cannot reorder it.
    """

    dense: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Args: weight: of any shape and memory format, which both are kept."""
        super().__init__()
        like = torch.zeros_like(weight, requires_grad=False)
        self.size = like.size()
        self.stride = like.stride()
        self._by_stride = sorted(range(like.ndim), key=lambda dim: -self.stride[dim])
        self.register_buffer("dense", self.flat(like), persistent=False)
        self._held = False
        self._written = False

    def write(self, trainable: Tensor) -> None:
        """Bring `self.dense` up to date."""
        raise NotImplementedError

    def gradient(self, grad: Tensor) -> Tensor:
        """The gradient of the trainable tensor from that of the weight."""
        raise NotImplementedError

    def forward(self, trainable: Tensor) -> Tensor:
        """The dense weight, differentiable with respect to `trainable`."""
        return cast(Tensor, _Materialize.apply(trainable, self))

    def materialize(self, trainable: Tensor) -> Tensor:
        """The dense weight: a view of the buffer, in the shape and strides of the weight."""
        if not self._written:
            self.write(trainable)
            self._written = self._held
        return self.dense.detach().as_strided(self.size, self.stride)

    def flat(self, tensor: Tensor) -> Tensor:
        """`tensor`, of the weight's shape, as one dimension in the order of the weight's memory."""
        return tensor.permute(self._by_stride).reshape(-1)

    def before_forward(self, module: nn.Module, inputs: Any) -> None:
        """Forward pre-hook: write once for the whole forward pass of `module`, not at each use."""
        self._held, self._written = True, False

    def after_forward(self, module: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook: the end of `before_forward`."""
        self._held, self._written = False, False


class Masked(Materialized):
    """weight = trainable where the mask is true, else +0; the gradient reaches the pruned ones too.

    The dense gradient lets a pruned weight grow until a new mask takes it back: dynamic network
    surgery (Guo et al., NIPS 2016, arXiv:1608.04493).
    """

    mask: Tensor

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        """Args: mask: bool, in the shape of `weight`; saved in checkpoints."""
        super().__init__(weight)
        self.register_buffer("mask", torch.zeros_like(weight, dtype=torch.bool).copy_(mask))
        self.register_buffer("zero", weight.new_zeros(()), persistent=False)

    def initial_trainable(self, weight: Tensor) -> Tensor:
        return weight.clone()

    def write(self, trainable: Tensor) -> None:
        weight = self.dense.data.as_strided(self.size, self.stride)
        torch.where(self.mask, trainable, cast(Tensor, self.zero), out=weight)

    def gradient(self, grad: Tensor) -> Tensor:
        return grad


class Packed(Materialized):
    """The trainable tensor holds the survivors alone, one after another; all others are zero.

    Optimizer state, gradient and all-reduce shrink with the density, and momentum, weight decay or
    rounding cannot touch a pruned weight, since there is none. (Singh & Bhatele, SAMO, IPDPS 2023.)
    The index costs 8 bytes a survivor and is not saved: the phase that starts again from the same
    weights finds it again.
    """

    index: Tensor

    def __init__(self, weight: Tensor, mask: Tensor) -> None:
        """Args: mask: bool, in the shape of `weight`: which survive."""
        super().__init__(weight)
        self.register_buffer("index", self.flat(mask).nonzero().squeeze(1), persistent=False)

    def initial_trainable(self, weight: Tensor) -> Tensor:
        return self.flat(weight).take(self.index)

    def write(self, trainable: Tensor) -> None:
        _write_at(self.dense.data, self.index, trainable)

    def gradient(self, grad: Tensor) -> Tensor:
        return self.flat(grad.to_dense()).take(self.index)  # an embedding's may be sparse


class Shared(Materialized):
    """The trainable tensor is a codebook: every survivor has the value of its cluster, all other
    weights are zero.

    The gradient of a value is the sum over its cluster (Han, Mao & Dally, Deep Compression, ICLR
    2016, arXiv:1510.00149, section 3.3), so that optimizer state, gradients and all-reduce are a
    few numbers per layer. Zero is no entry: a trainable zero would drift, and the sparsity with it.
    """

    index: Tensor  # of the survivors in the weight's memory
    codes: Tensor  # of the same survivors: which value each has
    sizes: Tensor  # of the clusters

    def __init__(self, weight: Tensor, codebook: Codebook) -> None:
        """Args: codebook: of `weight`, codes in its shape."""
        super().__init__(weight)
        self._values = codebook.values
        codes = self.flat(codebook.codes)
        index = codes.nonzero().squeeze(1)
        codes = codes[index].long() - 1
        self._is_sorted = _prefers_segments(weight)
        if self._is_sorted:
            codes, order = codes.sort(stable=True)
            index = index[order]
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("codes", codes, persistent=False)
        sizes = codes.bincount(minlength=len(codebook.values))
        self.register_buffer("sizes", sizes, persistent=False)

    def initial_trainable(self, weight: Tensor) -> Tensor:
        return self._values.clone()

    def write(self, trainable: Tensor) -> None:
        _write_at(self.dense.data, self.index, trainable.take(self.codes))

    def gradient(self, grad: Tensor) -> Tensor:
        taken = self.flat(grad.to_dense()).take(self.index)
        # In float64: a cluster may have millions of weights, which are added one after another.
        if self._is_sorted:
            sums = torch.segment_reduce(taken.double(), "sum", lengths=self.sizes, unsafe=True)
        else:
            sums = taken.new_zeros(len(self.sizes), dtype=torch.float64)
            sums.index_add_(0, self.codes, taken.double())
        return sums.to(taken.dtype)


class FakeQuant(Compression):
    """The weight on the grid of a quantizer; what is learnt is the weight itself, or what another
    compression makes it from: the survivors, the codebook.
    """

    def __init__(self, quantizer: WeightQuantizer, inner: Compression | None) -> None:
        super().__init__()
        self.inner = inner
        self._quantizer = (quantizer,)  # a child of the layer, and not of this

    def initial_trainable(self, weight: Tensor) -> Tensor:
        return weight.clone() if self.inner is None else self.inner.initial_trainable(weight)

    def forward(self, trainable: Tensor) -> Tensor:
        weight = trainable if self.inner is None else self.inner(trainable)
        return cast(Tensor, self._quantizer[0](weight))


def compression(module: nn.Module, name: str) -> Compression | None:
    """What is installed on `module.name`; None where it is a plain parameter."""
    if not is_parametrized(module, name):
        return None
    first = cast(nn.ModuleDict, module.parametrizations)[name][0]  # type: ignore[index]
    return first if isinstance(first, Compression) else None


def trainable_parameter(module: nn.Module, name: str) -> nn.Parameter | None:
    """The parameter that the optimizer sees for `module.name`: itself, or what makes it."""
    if compression(module, name) is None:
        return module._parameters[name]
    made = cast(nn.ModuleDict, module.parametrizations)[name]
    return next(made.parameters(recurse=False))


def _prefers_segments(weight: Tensor) -> bool:
    """Whether sums over clusters are faster, and reproducible, over values sorted by cluster.

    On CUDA, index_add_ sorts at each call to be deterministic. On the CPU it adds in order, and
    unsorted values lie in memory as the gradient does.
    """
    return weight.is_cuda


def _write_at(dense: Tensor, index: Tensor, values: Tensor) -> None:
    """`dense[index] = values`, where no index occurs twice.

    Without duplicates the result never depends on an order, but in deterministic mode CUDA sorts
    the indices at each call.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        dense.index_copy_(0, index, values)
    finally:
        torch.set_deterministic_debug_mode(mode)


class _Materialize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, trainable: Tensor, compression: Materialized) -> Tensor:
        ctx.compression = compression
        return compression.materialize(trainable)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.compression.gradient(grad), None
