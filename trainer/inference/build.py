"""Replaces layers of a model by layers that compute with compressed weights."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from trainer import artifact
from trainer.compress.quantize import ActivationQuantizer, WeightQuantizer, broadcast_scale
from trainer.compress.recurrent import LinearRecurrent
from trainer.compress.rewrite import restore
from trainer.data.tree import call_with
from trainer.errors import ConfigError
from trainer.inference.codes import to_codes
from trainer.inference.layers import DENSE, INT8, Choice, CompiledLayer, LayerKernel
from trainer.inference.matrix import Order, compress
from trainer.inference.products import (
    CompressedConvolution,
    CompressedLinear,
    ConvolutionShape,
    DenseConvolution,
    DenseLinear,
    Int8,
)
from trainer.inference.recurrent import FUSED, CompiledSteps, FusedSteps
from trainer.models.wrappers import unwrapped

COLUMNS: Order = "columns"
ROWS: Order = "rows"
CODES = "codes"
_ORDERS = (COLUMNS, ROWS)
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
_REPLACED = (nn.Linear, nn.Conv1d, nn.Conv2d, *FUSED)
MAX_DENSITY = 0.5
"""Fraction of nonzero weights above which kernels of entries are not tried."""
MIN_DENSITY = 0.05
"""Fraction of nonzero weights below which kernels of codes are not tried."""


def compile(
    model: nn.Module,
    weights: str | os.PathLike[str] | Mapping[str, Tensor] | None = None,
    samples: Any = None,
    *,
    kernels: Mapping[str, str] | None = None,
    threads: int | None = None,
) -> nn.Module:
    """Make a model compute with its compressed weights, without a dense copy of them.

        model = trainer.inference.compile(LeNet5(), "model.dcz", samples=images[:1])
        logits = model(images)

    Linear, Conv1d, Conv2d, LSTM and GRU layers are replaced if at least half of their weights are
    zero, or if quantization left them on a grid; a Linear also if it has at most 32 values. Each
    takes the kernel that is fastest in a short measurement: `columns` and `rows` compute with 16
    bits for each weight that is not zero (its position, and its code into the codebook of a shared
    weight), `codes` with 4 or 5 bits for each weight; `columns` and `codes` skip inputs that are
    zero; `dense` is torch's; `int8` computes quantized layers with integers.

    Args:
        model: A model of the same class and settings as the one compressed. It is changed in place,
            and loses wrappers of torch.compile and `nn.DataParallel`.
        weights: A model.dcz or model.safetensors file, or a state_dict; None: the model has its
            weights, as after `trainer.load`.
        samples: A typical batch, on which the kernels are measured now: a tensor is the model's
            argument, a tuple the positional ones, a mapping those by keyword. None: they are
            measured on the batch of the first call.
        kernels: The kernels of layers by name, as `chosen_kernels` returned them; they are not
            measured. Results have the same bits only if the kernels are the same.
        threads: Threads of the compressed kernels; None: as many as torch uses now.

    Returns:
        The model in evaluation mode. It can be pickled, and has no weights to train.

    Raises:
        ConfigError: `kernels` names a layer or kernel that does not exist, or weights are not
            float32 on the CPU, or NaN.
        trainer.artifact.ArtifactError: The file is damaged.
        OSError: The file cannot be read.
        RuntimeError: The weights do not fit the model.
    """
    model = unwrapped(model)
    if weights is not None:
        model = restore(model, weights if isinstance(weights, Mapping) else _read(Path(weights)))
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)  # its mask stays in the weight
    model.eval().requires_grad_(False)
    chosen = dict(kernels or {})
    count = torch.get_num_threads() if threads is None else threads
    if count < 1:
        raise ConfigError(f"threads={threads}: it must be at least 1")
    replaced: dict[int, nn.Module] = {}  # a layer that is used several times is replaced once
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) not in replaced:
            found = _compiled(name, module, chosen, count)
            if found is not None:
                replaced[id(module)] = found
        new = replaced.get(id(module))
        if new is not None and new is not module:
            if not name:
                model = new
            else:
                model.set_submodule(name, new)
    for module in model.modules():
        # Their fused kernels would read the weights, which decodes them at each call.
        if isinstance(module, nn.TransformerEncoderLayer) and _choices(module):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and _choices(module):
            module.use_nested_tensor = False
    unknown = set(chosen) - {layer.about.layer for layer in _choices(model)}
    if unknown:
        there = ", ".join(layer.about.layer for layer in _choices(model)) or "none"
        raise ConfigError(f"kernels: {min(unknown)!r} is not a compressed layer; there are {there}")
    if samples is not None:
        with torch.inference_mode():
            call_with(model, samples)
    return model


def layer_kernels(model: nn.Module) -> list[LayerKernel]:
    """The layers that `compile` replaced, with their kernels and the measured times."""
    return [layer.about for layer in _choices(model)]


def chosen_kernels(model: nn.Module) -> dict[str, str]:
    """The kernels that were chosen, for `compile(..., kernels=...)`."""
    chosen = {about.layer: about.kernel for about in layer_kernels(model)}
    return {layer: kernel for layer, kernel in chosen.items() if kernel is not None}


def _choices(model: nn.Module) -> list[Choice]:
    return [module for module in model.modules() if isinstance(module, Choice)]


def _read(path: Path) -> Mapping[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except safetensors.SafetensorError as error:
            raise artifact.ArtifactError(f"{path}: no .safetensors file, or damaged") from error
    return artifact.load(path)


def _compiled(
    name: str, module: nn.Module, chosen: Mapping[str, str], threads: int
) -> nn.Module | None:
    """The replacement of a layer; None if it is not replaced."""
    kind = type(module)
    if kind not in _REPLACED:
        return None
    for key in getattr(module, "_flat_weights_names", ["weight"]):
        weight = module._parameters.get(key)
        if weight is None:
            return None  # a hook computes it, such as that of the old weight_norm
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            raise ConfigError(
                f"{name or kind.__name__} has weights in {weight.dtype} on {weight.device.type}: a "
                "compiled model computes float32 on the CPU; call model.float().cpu() before"
            )
        if weight.isnan().any():
            raise ConfigError(f"{name or kind.__name__}: the weights have NaN")
    if kind is nn.Linear:
        return _linear(name, cast(nn.Linear, module), chosen, threads)
    if kind in FUSED:
        return _recurrent(name, module, chosen, threads)
    return _convolution(name, module, chosen, threads)


def _linear(
    name: str, module: nn.Linear, chosen: Mapping[str, str], threads: int
) -> CompiledLayer | None:
    matrix, scale, quantizer = _parts(module)
    candidates: dict[str, Any] = {}
    if _density(matrix) <= MAX_DENSITY:
        for order in _ORDERS:
            parts = threads if order == COLUMNS else 1
            candidates[order] = CompressedLinear(compress(matrix, order, parts), threads, scale)
    if _density(matrix) >= MIN_DENSITY and (codes := to_codes(matrix)) is not None:
        candidates[CODES] = CompressedLinear(codes, threads, scale)
    if quantizer is not None and scale is not None:
        candidates[INT8] = Int8(matrix.to(torch.int8), scale, quantizer)
    return _layer(name, module, candidates, DenseLinear, chosen, quantizer)


def _convolution(
    name: str, module: nn.Module, chosen: Mapping[str, str], threads: int
) -> CompiledLayer | None:
    shape = _shape(module)
    if shape is None:
        return None
    matrix, scale, quantizer = _parts(module)
    candidates: dict[str, Any] = {}
    flat = matrix.flatten(1)
    if _density(matrix) <= MAX_DENSITY:
        candidates[ROWS] = CompressedConvolution(
            compress(flat, ROWS), shape, tuple(matrix.shape), threads, scale
        )
    left, right, top, bottom = shape.padding
    even = left == right and top == bottom and matrix.ndim == 4
    if quantizer is not None and scale is not None and even:
        candidates[INT8] = Int8(matrix.to(torch.int8), scale, quantizer, shape)

    def dense(weight: Tensor) -> DenseConvolution:
        return DenseConvolution(weight, shape)

    return _layer(name, module, candidates, dense, chosen, quantizer)


def _layer(
    name: str,
    module: Any,
    candidates: dict[str, Any],
    dense: Any,
    chosen: Mapping[str, str],
    quantizer: ActivationQuantizer | None,
) -> CompiledLayer | None:
    if not candidates:
        return None
    compressed = next((candidates[o] for o in (ROWS, COLUMNS, CODES) if o in candidates), None)
    # If there is a compressed form, the dense weight is decoded from it for the measurement.
    candidates[DENSE] = None if compressed else dense(module.weight.detach())
    made = CompiledLayer(
        _about(name, module, compressed and compressed.matrix.bits),
        module.bias,
        candidates,
        _chosen(name, candidates, chosen),
        quantizer,
    )
    _carry_over(module, made)
    return made


def _recurrent(
    name: str, module: Any, chosen: Mapping[str, str], threads: int
) -> LinearRecurrent | None:
    build = FUSED[type(module)]
    weights = [p for n, p in module.named_parameters() if n.startswith("weight")]
    if not build.accepts(module) or min(map(_density, weights)) > MAX_DENSITY:
        return None
    made = build(module)
    layers: list[Any] = list(made.layers)
    for number, layer in enumerate(layers):
        ih, hh = layer.ih, layer.hh
        candidates: dict[str, Any] = {}
        inputs = CompressedLinear(compress(ih.weight, ROWS), threads)
        for order in _ORDERS:
            candidates[order] = FusedSteps(type(module), inputs, compress(hh.weight, order))
        candidates[DENSE] = None
        label = f"{name}.layers.{number}" if name else f"layers.{number}"
        both = torch.cat([ih.weight, hh.weight], 1)
        about = LayerKernel(
            label,
            type(module).__name__,
            tuple(both.shape),
            _density(both),
            candidates[ROWS].recurrent.bits,
            None,
            {},
            0,
        )
        picked = _chosen(label, candidates, chosen)
        made.layers[number] = CompiledSteps(
            about, type(module), candidates, picked, (ih.bias, hh.bias)
        )
    made.eval()
    _carry_over(module, made)
    return made


def _about(name: str, module: nn.Module, bits: int | None) -> LayerKernel:
    weight: Any = module.weight
    return LayerKernel(
        name, type(module).__name__, tuple(weight.shape), _density(weight), bits, None, {}, 0
    )


def _chosen(name: str, candidates: Mapping[str, Any], chosen: Mapping[str, str]) -> str | None:
    kernel = chosen.get(name)
    if kernel is not None and kernel not in candidates:
        raise ConfigError(f"kernels[{name!r}]={kernel!r}: there are {', '.join(candidates)}")
    return kernel


def _density(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / max(1, weight.numel())


def _parts(module: Any) -> tuple[Tensor, Tensor | None, ActivationQuantizer | None]:
    """The weight, or its integers with their scales and the quantizer of the inputs."""
    weight = module.weight.detach().float()
    grid = getattr(module, "weight_quantizer", None)
    quantizer = getattr(module, "input_quantizer", None)
    if not isinstance(quantizer, ActivationQuantizer) or not quantizer.ready:
        quantizer = None
    if not isinstance(grid, WeightQuantizer):
        return weight, None, quantizer
    integers = (weight / broadcast_scale(grid.scale, weight.ndim)).round()
    if not torch.equal(integers * broadcast_scale(grid.scale, weight.ndim), weight):
        return weight, None, quantizer
    return integers, grid.scale.reshape(-1).expand(len(weight)).contiguous(), quantizer


def _shape(module: Any) -> ConvolutionShape | None:
    """The settings of a convolution; None if its padding is not zeros."""
    if module.padding_mode != "zeros":
        return None
    one = module.weight.ndim == 3
    pads = list(module._reversed_padding_repeated_twice)  # as F.pad takes it

    def pair(value: tuple[int, ...]) -> tuple[int, int]:
        return (1, value[0]) if one else (value[0], value[1])

    return ConvolutionShape(
        module.in_channels,
        module.out_channels,
        module.groups,
        pair(module.kernel_size),
        pair(module.stride),
        (pads[0], pads[1], 0, 0) if one else (pads[0], pads[1], pads[2], pads[3]),
        pair(module.dilation),
    )


def _carry_over(old: nn.Module, new: nn.Module) -> None:
    """Move hooks and settings to the new layer, but not the hook of the input quantizer.

    The new layer calls that quantizer itself.
    """
    for name, value in vars(old).items():
        if not name.startswith("_") and not hasattr(new, name):
            setattr(new, name, value)  # such as in_features, which the model's code may read
    quantizer = getattr(old, "input_quantizer", None)
    own = {handle.id for handle in getattr(quantizer, "handles", ())}
    for kind in _HOOKS:
        kept = {key: hook for key, hook in getattr(old, kind).items() if key not in own}
        getattr(new, kind).update(kept)
    output = getattr(old, "output_quantizer", None)
    if output is not None:
        new.output_quantizer = output
    for own_quantizer in (quantizer, output):
        if own_quantizer is not None:
            own_quantizer.handles = []  # of hooks of the old layer; they cannot be pickled
