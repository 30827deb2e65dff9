"""Layers that compute with compressed weights, each with its fastest kernel."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compress.quantize import ActivationQuantizer
from trainer.inference.measure import alternate
from trainer.inference.products import (
    CompressedConvolution,
    DenseConvolution,
    DenseLinear,
    Int8,
    Product,
)

DENSE, INT8 = "dense", "int8"

_SECONDS = 0.03  # for the choice among the kernels of a layer
_CHOICE = threading.Lock()


@dataclass(frozen=True)
class LayerKernel:
    """The kernel of a layer, and the measurements from which it was chosen."""

    layer: str
    kind: str
    """Class of the layer that it replaces."""
    shape: tuple[int, ...]
    """Of the weight."""
    density: float
    """Fraction of the weights that are not zero."""
    code_bits: int | None
    """Bits of a code in a compressed weight; 0: values are stored; None: not compressed."""
    kernel: str | None
    """columns, rows, codes (all compressed), dense or int8; None: chosen at the first call."""
    microseconds: Mapping[str, float]
    """Median time of each kernel that was measured; empty if there was no choice."""
    nbytes: int
    """Bytes of the weight in memory."""


class Choice(nn.Module):
    """Base class: a layer that chooses among candidates at its first call.

    Attributes:
        about: The description that `trainer.inference.layer_kernels` returns.
        product: The chosen candidate; None before the first call.
    """

    def __init__(self, about: LayerKernel) -> None:
        super().__init__()
        self.about = about
        self.product: Any = None
        self._candidates: dict[str, Any] = {}

    def start(self, candidates: Mapping[str, Any], chosen: str | None) -> None:
        """Set the candidates; keep the chosen one, or the only one, without measuring.

        Args:
            candidates: By name; None: `candidate` builds it when it is needed.
        """
        self._candidates = dict(candidates)
        if chosen is None and len(candidates) == 1:
            (chosen,) = candidates
        if chosen is not None:
            self._keep(chosen, {})

    def candidate(self, name: str) -> Any:
        """Build a candidate that is only needed for the measurement."""
        raise NotImplementedError

    def call(self, product: Any, *args: Any) -> Any:
        """Compute the layer's output with a candidate."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The dense weight, decoded at each access, for code that reads the layer's weight."""
        weight: Tensor = (self.product or next(iter(self._candidates.values()))).dense()
        return weight

    def choose(self, *args: Any) -> Any:
        """Measure the candidates on the arguments of `call`, and keep and return the fastest."""
        with _CHOICE:  # other threads may call the model at the same time
            if self.product is None and not args[0].numel():  # nothing to measure: not chosen yet
                return next(of for of in self._candidates.values() if of is not None)
            return self.product or self._choose(*args)

    def _choose(self, *args: Any) -> Any:
        candidates = {name: of or self.candidate(name) for name, of in self._candidates.items()}
        calls = {
            name: (lambda product=product: self.call(product, *args))
            for name, product in candidates.items()
        }
        taken = {name: min(times) for name, times in alternate(calls, _SECONDS).items()}
        self._candidates = candidates
        self._keep(min(taken, key=lambda name: taken[name]), taken)
        return self.product

    def keep(self, name: str) -> bool:
        """Keep a candidate without measuring, if there is one of that name; return whether."""
        if name in self._candidates:
            self._keep(name, {})
        return self.about.kernel == name

    def _keep(self, name: str, taken: Mapping[str, float]) -> None:
        product = self._candidates[name] or self.candidate(name)
        microseconds = {kernel: 1e6 * seconds for kernel, seconds in taken.items()}
        self.about = replace(
            self.about, kernel=name, microseconds=microseconds, nbytes=product.nbytes
        )
        self.product, self._candidates = product, {}

    def extra_repr(self) -> str:
        about = self.about
        kernel = about.kernel or "chosen at the first call"
        return f"{about.kind}, shape={list(about.shape)}, kernel={kernel}"


class CompiledLayer(Choice):
    """Replaces a Linear or convolution. The bias remains a tensor of torch."""

    bias: Tensor | None

    def __init__(
        self,
        about: LayerKernel,
        bias: Tensor | None,
        candidates: Mapping[str, Product | None],
        chosen: str | None,
        quantizer: ActivationQuantizer | None = None,
    ) -> None:
        """
        Args:
            about: The description before the choice.
            candidates: The kernels by name; None: `dense`, which is built when it is needed.
            chosen: The kernel to use without measuring; None: measure at the first call.
            quantizer: Of the inputs.
        """
        super().__init__(about)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.input_quantizer = quantizer
        self.start(candidates, chosen)

    def candidate(self, name: str) -> Product:
        source = next(of for of in self._candidates.values() if of is not None)
        if isinstance(source, CompressedConvolution):
            return DenseConvolution(source.dense(), source.shape)
        return DenseLinear(source.dense())

    def call(self, product: Product, x: Tensor) -> Tensor:
        if self.input_quantizer is not None and not isinstance(product, Int8):
            x = self.input_quantizer(x)
        return product(x, self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """As the layer that this one replaces; evaluation only.

        Raises:
            TypeError: `input` is not float32, or nested.
            RuntimeError: `input` needs a gradient, or has a shape that the layer cannot take.
        """
        check_input(input)
        product = self.product or self.choose(input)
        return self.call(product, input)


def check_input(x: Tensor) -> None:
    """Refuse inputs that kernels cannot compute. Raises TypeError or RuntimeError."""
    if x.is_nested:
        raise TypeError("a compiled model takes padded tensors, not nested ones")
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise TypeError(
            f"a compiled model computes float32 on the CPU, not {x.dtype} on {x.device.type}"
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "a compiled model computes no gradients: call it under torch.no_grad() or "
            "torch.inference_mode(), or with inputs that need none"
        )
