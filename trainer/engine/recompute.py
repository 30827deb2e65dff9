"""Gradient checkpointing: activations of some modules are computed again in the backward pass.

It trades time for memory: of such a module only the inputs are kept (Chen et al., Training Deep
Nets with Sublinear Memory Cost, 2016, arXiv:1604.06174). Results stay the same bit for bit.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.compress.parametrize import Compression
from trainer.compress.select import no_match
from trainer.errors import ConfigError


@contextlib.contextmanager
def recomputed(model: nn.Module, patterns: Sequence[str]) -> Iterator[None]:
    """Within the block, training computes the matching modules twice.

    Args:
        model: As it is trained; its weights may be compressed.
        patterns: As in `check_recompute`; one that matches nothing is ignored.
    """
    found = _outermost(model, patterns)
    for module in found:
        module._compiled_call_impl = functools.partial(_call, module)  # copies do not inherit it
    try:
        yield
    finally:
        for module in found:
            module._compiled_call_impl = None


def check_recompute(model: nn.Module, patterns: Sequence[str]) -> None:
    """Raise ConfigError for a pattern that matches no module that has a `forward`.

    Args:
        model: As it is built; it may be on the meta device.
        patterns: Shell patterns on the names of modules.
    """
    callable_modules = [
        name
        for name, module in model.named_modules()
        if name and type(module).forward is not nn.Module.forward
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in callable_modules):
            raise ConfigError(f"recompute: {no_match(pattern, callable_modules, 'module')}")


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a call of the module does, its hooks included."""
    if not torch.is_grad_enabled():
        return module._call_impl(*args, **kwargs)
    return checkpoint(
        module._call_impl,
        *args,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _buffers_kept(module)),
        **kwargs,
    )


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Batch norm, for one, must count a batch in its running statistics only once."""
    before = [
        (buffer, buffer.clone())
        for part in module.modules()
        if not isinstance(part, Compression)
        for buffer in part.buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _outermost(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The matching modules, without those inside others."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        matching = any(fnmatchcase(name, pattern) for pattern in patterns)
        inside = any(name.startswith(f"{other}.") for other in found)
        if name and matching and not inside and type(module).forward is not nn.Module.forward:
            found[name] = module
    return list(found.values())
