"""torch.compile for a model in training, whether its weights are compressed or not.

What computes a compressed weight writes into memory that stays, which compilers cannot trace. So
the weights are computed before each call, and what is compiled is the model with plain weights.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from trainer.compress.parametrize import compression
from trainer.data.tree import tensors
from trainer.engine.heartbeat import Heartbeat
from trainer.errors import ConfigError, first_line

RECOMPILATIONS = 64  # variants of a model: sizes of batches, training and evaluation


def compile_options(setting: Any) -> dict[str, Any]:
    """The arguments of torch.compile for the setting `compile`, which is not false.

    `dynamic` is false by default: kernels for any size of batch may round otherwise than those for
    one size, and which of them is used would depend on where a run was resumed.
    """
    return {"dynamic": False, **(setting if isinstance(setting, Mapping) else {})}


def check_compiler(setting: Any, device: torch.device) -> None:
    """Compile a function. Raises ConfigError if that is not possible here."""
    try:
        torch.compile(_add_one, **compile_options(setting))(torch.zeros(2, device=device))
    except Exception as error:  # of any back end
        raise ConfigError(
            f"compile={setting}: torch.compile fails on this machine: "
            f"{first_line(error).rstrip('.')}; set compile=false"
        ) from error


@contextlib.contextmanager
def compiled(model: nn.Module, setting: Any, heartbeat: Heartbeat) -> Iterator[None]:
    """Within the block, calls of the model run compiled, in training and in evaluation.

    Args:
        model: With the structure that it has in the whole block.
        setting: `compile`; false: the model stays as it is.
        heartbeat: Of the worker, which is busy while the model is compiled.
    """
    if not setting:
        yield
        return
    torch.compiler.reset()  # variants of other structures would count as recompilations

    def plain(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)  # torch would skip it as a function of its own

    call = torch.compile(plain, **compile_options(setting))

    seen = set()

    def with_plain_weights(*args: Any, **kwargs: Any) -> Any:
        shapes = tuple(tensor.shape for tensor in tensors((args, kwargs)))
        variant = model.training, torch.is_grad_enabled(), shapes
        compiles = variant not in seen
        seen.add(variant)
        with (
            heartbeat.busy() if compiles else contextlib.nullcontext(),
            torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS),
            plain_weights(model),
        ):
            return call(*args, **kwargs)

    model._compiled_call_impl = with_plain_weights  # as nn.Module.compile does
    try:
        yield
    finally:
        model._compiled_call_impl = None


@contextlib.contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Within the block, parametrized weights are tensors that were computed at its beginning.

    Gradients reach what they were computed from. Weights of recurrent layers, which no compiler
    traces, stay as they are.
    """
    found = [
        (module, type(module), list(cast(nn.ModuleDict, module.parametrizations)))
        for module in model.modules()
        if is_parametrized(module) and not isinstance(module, nn.RNNBase)
    ]
    values: dict[nn.Module | None, Tensor] = {}  # by the compression, which tied weights share
    for module, _, names in found:
        for name in names:
            shared = compression(module, name)
            if shared is None or shared not in values:
                values[shared] = getattr(module, name)
            vars(module)[name] = values[shared]
    for module, kind, _ in found:
        module.__class__ = kind.__bases__[0]  # without the properties of the parametrized class
    try:
        yield
    finally:
        for module, kind, names in found:
            module.__class__ = kind
            for name in names:
                del vars(module)[name]


def _add_one(value: Tensor) -> Tensor:
    return value + 1
