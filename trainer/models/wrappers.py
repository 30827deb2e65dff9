"""Wrappers of torch around a model, whose names would otherwise be in the names of its weights."""

from typing import Any

from torch import nn


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module in the wrapper of torch.compile or in `nn.DataParallel`; None: it is neither."""
    # torch.compile's class is slow to import.
    name = "module" if isinstance(module, nn.DataParallel) else "_orig_mod"
    inner: nn.Module | None = getattr(module, name, None)
    return inner


def unwrapped(model: Any) -> Any:
    """A model without the wrappers around it and around its parts, in place.

    Args:
        model: A module; anything else is returned as it is.
    """
    if not isinstance(model, nn.Module):
        return model
    while (inner := wrapped_in(model)) is not None:
        model = inner
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None and wrapped_in(child) is not None:
                module._modules[name] = unwrapped(child)
    return model


def is_compiled(model: Any) -> bool:
    """Whether a model, or a part of it, was compiled by torch.compile or `nn.Module.compile`."""
    return isinstance(model, nn.Module) and any(
        "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for module in model.modules()
    )
