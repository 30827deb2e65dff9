"""fp16 arithmetic on CPUs: values rounded to fp16, sums in FP32, as tensor cores compute."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        functional.linear,
        torch.matmul,
        torch.mm,
        torch.bmm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
        torch.Tensor.mm,
        torch.Tensor.bmm,
        *(getattr(functional, f"conv{n}d") for n in (1, 2, 3)),
        *(getattr(functional, f"conv_transpose{n}d") for n in (1, 2, 3)),
    }
)


class HalfProducts(TorchFunctionMode):
    """Computes products and convolutions of fp16 values in FP32, and rounds the results to fp16.

    Results have the type that autocast gives them, and gradients are rounded alike, so that values
    overflow and vanish as on a GPU. torch's own fp16 convolutions on CPUs are a hundred times
    slower. Recurrent layers, which are one operation for torch, are left to it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            rounded = [_rounded(value) for value in args]
            named = {name: _rounded(value) for name, value in kwargs.items()}
            return func(*rounded, **named).half()


def _rounded(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.half().float()
    return value
