"""Quantization-aware training: weights and layer inputs are rounded while the model trains."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import ClassVar

import torch
from torch import nn

from trainer.compress.half import round_to_half
from trainer.compress.install import fold, install
from trainer.compress.parametrize import FakeQuant
from trainer.compress.quantize import (
    BITS,
    LAYERS,
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    attach,
    detach_unused,
)
from trainer.compress.rewrite import fold_batch_norms, foldable, skeleton, unroll_lstms
from trainer.compress.select import (
    ParameterRef,
    match_patterns,
    module_of,
    parameters,
    select_weights,
)
from trainer.config import FitConfig, check_choice
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases.base import Phase
from trainer.phases.retrain import surviving


@dataclass
class Quantize(Phase):
    """Round weights and layer inputs to a grid of few integers, and train with the rounding.

    Batch norm is folded first where that changes nothing (trainer.compress.rewrite.foldable). An
    LSTM is rebuilt from Linear layers, so that its weights get names such as
    "lstm.layers.0.ih.weight", which patterns must use. The scale of a weight is the one of least
    squared error at the start and stays fixed. The range of an input is a moving average of the
    smallest and largest finite value of each step over all ranks; the first step, before there is a
    range, rounds weights only. Jacob et al., CVPR 2018, arXiv:1712.05877.

    The phase leaves plain weights that lie on their grid, and quantizers that hold scales and
    ranges (trainer.compress.quantize). Inputs of a layer that the model never calls, and inputs
    that were always zero, are not quantized.

    Args:
        bits: Bits of a weight, 2 to 8.
        overrides: Bits by name pattern.
        activations: Bits of a layer's input, 2 to 8; None: only weights are quantized.
        outputs: Name patterns of layers whose output is quantized as well.
        per_channel: Whether each output channel has its own scale, or one per weight.
        momentum: Weight of a step in the moving average of the ranges, in (0, 1].
        fold: Whether batch norm is folded into the layer before it.
        keep: Properties of the weights that are preserved: "zeros", "sharing".
        include: Name patterns of the weights to quantize.
        exempt: Name patterns of weights that are not quantized after all.
    """

    kind: ClassVar[str] = "quantize"
    makes: ClassVar[frozenset[str]] = frozenset({"quantization"})

    bits: int = 8
    overrides: dict[str, int] = field(default_factory=dict)
    activations: int | None = 8
    outputs: list[str] = field(default_factory=list)
    per_channel: bool = True
    momentum: float = 0.05
    fold: bool = True
    keep: list[str] = field(default_factory=lambda: ["zeros"])
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=1), kw_only=True)

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset(self.keep)

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"sharing", "quantization"}) - self.keeps

    def check_settings(self) -> None:
        widths: dict[str, int | None] = {"bits": self.bits, "activations": self.activations}
        widths |= {f"overrides.{pattern}": bits for pattern, bits in self.overrides.items()}
        for key, bits in widths.items():
            if bits is not None and bits not in BITS:
                raise ConfigError(f"{key}={bits}: it must be 2 to 8 bits")
        for what in self.keep:
            check_choice("keep", what, ("zeros", "sharing"))
        if not 0 < self.momentum <= 1:
            raise ConfigError(f"momentum={self.momentum}: it must be above 0 and at most 1")
        if "sharing" in self.keep and self.per_channel:
            raise ConfigError(
                "per_channel=true with keep=[sharing]: weights of one value would get several "
                "scales, and so several values; set per_channel=false"
            )
        if self.activations is not None and self.fit.epochs == 0:
            raise ConfigError(
                f"activations={self.activations} with fit.epochs=0: the ranges are learned in "
                "training; set epochs, or activations=null"
            )
        if self.outputs and self.activations is None:
            raise ConfigError(f"outputs={self.outputs} with activations=null: set activations=8")

    def check_model(self, model: nn.Module) -> None:
        if self.fold and "sharing" in self.keep and foldable(model):
            raise ConfigError(
                "fold=true with keep=[sharing]: folding batch norm gives each channel of a shared "
                "weight its own values; set fold=false"
            )
        self._rewrite(skeleton(model))

    def enter(self, model: nn.Module, world: World) -> None:
        quantizers = self._rewrite(model)
        places = parameters(model)
        for name, quantizer in quantizers.items():
            quantizer.calibrate(places[name][0].value)
        world.broadcast(quantizer.scale for quantizer in quantizers.values())
        inner = surviving(model, world, self.keeps)
        made = {
            name: FakeQuant(quantizer, inner.get(name)) for name, quantizer in quantizers.items()
        }
        install(model, inner | made)

    def after_step(self, model: nn.Module, world: World, step: int, total: int) -> None:
        found = activation_quantizers(model)
        if not found:
            return
        mine = torch.stack([quantizer.seen for quantizer in found])
        table = mine.new_zeros(world.size, *mine.shape)  # one row per rank
        table[world.rank] = mine
        world.all_reduce(table)
        low = reduce(torch.fmin, table[..., 0])  # NaN if no rank has observed a value
        high = reduce(torch.fmax, table[..., 1])
        for quantizer, seen in zip(found, torch.stack((low, high), 1), strict=True):
            quantizer.update_range(seen, self.momentum)

    def leave(self, model: nn.Module) -> None:
        fold(model)
        detach_unused(model)
        round_to_half(model)

    def _rewrite(self, model: nn.Module) -> dict[str, WeightQuantizer]:
        """Change the structure; return the quantizer of each weight. Raises ConfigError."""
        if self.fold:
            fold_batch_norms(model)
        unroll_lstms(model)
        chosen = select_weights(model, self.include, self.exempt)
        _check_layers(chosen)
        bits = dict.fromkeys(chosen, self.bits) | match_patterns(self.overrides, chosen)
        outputs = match_patterns(dict.fromkeys(self.outputs, True), chosen)
        made = {}
        for name, places in chosen.items():
            channels = len(places[0].value) if self.per_channel else None
            made[name] = WeightQuantizer(bits[name], channels)
            for layer, _ in places:
                attach(layer, "weight", made[name])
                if self.activations is not None and not isinstance(layer, nn.Embedding):
                    attach(layer, "input", ActivationQuantizer(self.activations))
                if self.activations is not None and name in outputs:
                    attach(layer, "output", ActivationQuantizer(self.activations))
        return made


def _check_layers(chosen: Mapping[str, list[ParameterRef]]) -> None:
    wrong = {
        name: type(layer).__name__
        for name, places in chosen.items()
        for layer, attribute in places
        if not isinstance(layer, LAYERS) or attribute != "weight"
    }
    if wrong:
        found = ", ".join(f"{name} (of {kind})" for name, kind in wrong.items())
        raise ConfigError(
            "only weights of Linear, Conv, Embedding and a plain LSTM can be quantized, not "
            f"{found}; exempt=[{_patterns(wrong)}]"
        )
    types = {name: places[0].value.dtype for name, places in chosen.items()}
    wide = {name: dtype for name, dtype in types.items() if dtype is not torch.float32}
    if wide:
        found = ", ".join(f"{n} ({str(t).removeprefix('torch.')})" for n, t in wide.items())
        raise ConfigError(
            f"only float32 weights can be quantized, not {found}; convert the model with .float(), "
            f"or set exempt=[{_patterns(wide)}]"
        )


def _patterns(names: Iterable[str]) -> str:
    """Patterns for `exempt` that match these weights."""
    return ", ".join(dict.fromkeys(module_of(name) or name for name in names))
