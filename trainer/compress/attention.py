"""Multi-head attention built from Linear layers, so that its projections can be quantized."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, linear, scaled_dot_product_attention

_settings = RLock()
_fast_path = Lock()
_enabled: list[bool] = []  # what each block found: after the first one, False


class LinearAttention(nn.Module):
    """Computes what the nn.MultiheadAttention that it is made from computes, up to rounding.

    It is called like nn.MultiheadAttention. Its Linears are `in_proj`, which makes queries, keys
    and values, and `out_proj`.
    """

    _qkv_same_embed_dim = False  # nn.TransformerEncoderLayer then uses no fused kernel

    def __init__(self, source: nn.MultiheadAttention) -> None:
        """Take over the weights of `source`.

        Raises:
            ValueError: `source` is not accepted; see `accepts`.
        """
        super().__init__()
        if not self.accepts(source):
            raise ValueError("this attention cannot be built from Linear layers here")
        self.embed_dim = source.embed_dim
        self.num_heads = source.num_heads
        self.dropout = float(source.dropout)
        self.batch_first = source.batch_first
        with torch.device("meta"):
            self.in_proj = _Projection(
                source.embed_dim, 3 * source.embed_dim, source.in_proj_bias is not None
            )
        assert source.in_proj_weight is not None
        self.in_proj.weight = source.in_proj_weight
        if source.in_proj_bias is not None:
            self.in_proj.bias = source.in_proj_bias
        self.out_proj = source.out_proj

    @classmethod
    def accepts(cls, module: nn.Module) -> bool:
        """Whether a module can be replaced.

        A subclass cannot, since it may compute something else; nor can an attention with keys and
        values of other sizes (kdim, vdim), or with keys and values of its own (add_bias_kv,
        add_zero_attn).
        """
        return (
            type(module) is nn.MultiheadAttention
            and module._qkv_same_embed_dim
            and module.bias_k is None
            and not module.add_zero_attn
        )

    @property
    def in_proj_weight(self) -> Tensor:
        """As in nn.MultiheadAttention; nn.TransformerEncoder reads it."""
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Tensor | None:
        """As in nn.MultiheadAttention; nn.TransformerEncoderLayer reads it."""
        return self.in_proj.bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See nn.MultiheadAttention.

        `is_causal` alone changes nothing, since `attn_mask` says the same.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint; pass attn_mask as well")
        batched = query.ndim == 3
        q, k, v = (self._heads(part, batched) for part in self._project(query, key, value))
        mask = _additive_mask(attn_mask, key_padding_mask, q, batched)
        attended, weights = self._attend(q, k, v, mask, need_weights)
        output: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if self.batch_first else output.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, in the order of the inputs' dimensions."""
        if query is key and key is value:
            parts: tuple[Tensor, ...] = self.in_proj(query).chunk(3, -1)
            return parts
        if key is value:
            return self.in_proj(query, 0, 1), *self.in_proj(key, 1, 3).chunk(2, -1)
        return tuple(self.in_proj(x, n, n + 1) for n, x in enumerate((query, key, value)))

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """`x` as [N, heads, length, embed / heads]."""
        if not batched:
            x = x.unsqueeze(0)
        elif not self.batch_first:
            x = x.transpose(0, 1)
        return x.view(*x.shape[:-1], self.num_heads, -1).transpose(1, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs [N, heads, length, embed / heads], and attention weights if they are needed."""
        p = self.dropout if self.training else 0.0
        if not need_weights:
            return scaled_dot_product_attention(q, k, v, mask, p), None
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = dropout(weights, p, self.training)
        return weights @ v, weights


class _Projection(nn.Linear):
    """The Linear of queries, keys and values; computes all of them, or some."""

    def forward(self, input: Tensor, start: int = 0, end: int = 3) -> Tensor:
        """Args: start, end: Range of the outputs: 0 queries, 1 keys, 2 values."""
        if (start, end) == (0, 3):
            return linear(input, self.weight, self.bias)
        size = self.out_features // 3  # less than in_features where heads were removed
        rows = slice(start * size, end * size)
        bias = None if self.bias is None else self.bias[rows]
        return linear(input, self.weight[rows], bias)


def _additive_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, batched: bool
) -> Tensor | None:
    """Both masks as one that is added to the scores [N, heads, length, source length].

    Args:
        attn_mask: [length, source length] or [N * heads, length, source length].
        key_padding_mask: [N, source length]; without N if not batched.
        q: [N, heads, length, embed / heads].
        batched: Whether the inputs have a dimension for samples.
    """
    mask = None if attn_mask is None else _as_float(attn_mask, q.dtype)
    if mask is not None:
        mask = mask.unflatten(0, (-1, q.shape[1])) if mask.ndim == 3 else mask[None, None]
    if key_padding_mask is not None:
        padding = _as_float(key_padding_mask, q.dtype)
        padding = (padding if batched else padding[None])[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def _as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask in which True means "not allowed" as numbers to be added."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


@contextmanager
def unfused_attention() -> Iterator[None]:
    """Let attention run as matrix products, which its fused operators would hide.

    PyTorch's settings belong to the process, so one thread at a time is in such a block: trials of
    a sweep may run in several.
    """
    with _settings, without_fast_path(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Let transformers of torch.nn in evaluation call their layers with ordinary tensors.

    Otherwise nn.TransformerEncoder packs padded batches into nested tensors. The setting belongs to
    the process. Several threads may be in such a block, and the last one to leave restores it.
    """
    with _fast_path:
        _enabled.append(torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        with _fast_path:
            torch.backends.mha.set_fastpath_enabled(_enabled.pop())


def disable_nested_tensors(model: nn.Module) -> None:
    """Let each nn.TransformerEncoder with such an attention pass ordinary tensors to it."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            attentions: list[Any] = [getattr(layer, "self_attn", None) for layer in module.layers]
            if any(isinstance(attention, LinearAttention) for attention in attentions):
                module.use_nested_tensor = False
