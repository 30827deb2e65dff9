"""Quantization: weights and layer inputs are rounded, before or while the model trains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.compress.calibrate import RANGES, calibrate
from trainer.compress.equalize import equalize
from trainer.compress.half import round_to_half
from trainer.compress.install import fold, install
from trainer.compress.layers import LAYERS, SUPPORTED, is_transposed, rebuild, transpose
from trainer.compress.parametrize import FakeQuant
from trainer.compress.quantize import (
    BITS,
    INPUT,
    OUTPUT,
    ActivationQuantizer,
    WeightQuantizer,
    activation_quantizers,
    attach,
    detach_unused,
)
from trainer.compress.rewrite import fold_batch_norms, foldable, skeleton
from trainer.compress.select import (
    ParameterRef,
    match_patterns,
    module_of,
    parameters,
    select_weights,
    weights,
)
from trainer.config import FitConfig, check_choice, check_min
from trainer.config.instantiate import locate
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.models.copying import copy_model
from trainer.phases.auto import AUTO, MAX_BITS, check_auto, limit_for, search_bits
from trainer.phases.base import Evaluate, Phase
from trainer.phases.retrain import surviving

UNSUPPORTED = "unsupported"
"""In `exempt`: all weights that cannot be quantized."""


@dataclass
class Quantize(Phase):
    """Round weights and layer inputs to a grid of few integers, and train with the rounding.

    With `samples` the phase first calibrates itself with the inputs of that many training samples,
    whose labels it does not use (trainer.compress.calibrate), and with `epochs=0` it trains nothing
    more.

    Batch norm is folded first where that changes nothing (trainer.compress.rewrite.foldable).
    LSTM, GRU, RNN and MultiheadAttention are rebuilt from Linear layers, so that their weights get
    names such as "lstm.layers.0.ih.weight" and "attention.in_proj.weight", which patterns must use.
    The scale of a weight is the one of least squared error at the start and stays fixed. The range
    of an input is a moving average of the smallest and largest finite value of each step over all
    ranks; the first step, before there is a range, rounds weights only. Jacob et al., CVPR 2018,
    arXiv:1712.05877.

    The phase leaves plain weights that lie on their grid, and quantizers that hold scales and
    ranges (trainer.compress.quantize). Inputs of a layer that the model never calls, and inputs
    that were always zero, are not quantized.

    Args:
        bits: Bits of a weight, 2 to 8. "auto": the fewest bits of each layer with which the first
            metric on validation data is within `max_drop` before training, calibrated if there
            are samples (trainer.phases.auto).
        overrides: Bits by name pattern.
        activations: Bits of a layer's input, 2 to 8; None: only weights are quantized.
        outputs: Name patterns of layers whose output is quantized as well.
        layers: Your own classes of layers whose weights can be quantized as well, or their dotted
            paths; docs/own-layer.md says what they must do.
        per_channel: Whether each output channel has its own scale, or one per weight. Channels are
            the first dimension of a weight; in a ConvTranspose these are the input's.
        samples: Number of training samples to calibrate with; 0: the ranges of inputs are learned
            in training.
        ranges: How calibration finds the range of an input: "minmax", "mse" (least squared error)
            or "percentile" (99.99% of the values on each side of zero). The last two cut off
            outliers, which transformers need.
        rounding: Of weights, in calibration: "nearest", or "second_order", which compensates for
            the error of a weight by others of the same output, according to the layer's inputs
            (GPTQ, arXiv:2210.17323), for Linear and convolutions. Others take the nearest value.
        equalize: Whether calibration first gives the channels between two layers weights of similar
            size, where that changes no output (trainer.compress.equalize): across ReLU, but not
            across GELU. It helps most with `per_channel=False` and depthwise convolutions.
        correct_bias: Whether calibration restores the mean of each output by a change of the bias.
        momentum: Weight of a step in the moving average of the ranges, in (0, 1].
        fold: Whether batch norm is folded into the layer before it.
        keep: Properties of the weights that are preserved: "zeros", "sharing".
        include: Name patterns of the weights to quantize.
        exempt: Name patterns of weights that are excluded; "unsupported" for all
            weights that cannot be quantized.
        max_drop: With `bits="auto"`: how much worse than the dense model's the first metric may be,
            as for `AutoPrune`. None: the phase's share of the limit of the experiment.
    """

    kind: ClassVar[str] = "quantize"
    makes: ClassVar[frozenset[str]] = frozenset({"quantization"})

    bits: int | str = 8
    overrides: dict[str, int] = field(default_factory=dict)
    activations: int | None = 8
    outputs: list[str] = field(default_factory=list)
    layers: list[Any] = field(default_factory=list)
    per_channel: bool = True
    samples: int = 0
    ranges: str = "minmax"
    rounding: str = "second_order"
    equalize: bool = False
    correct_bias: bool = True
    momentum: float = 0.05
    fold: bool = True
    keep: list[str] = field(default_factory=lambda: ["zeros"])
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)
    max_drop: Any = None
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=1), kw_only=True)

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        super().__post_init__(epochs, lr)
        self._inputs: Sequence[Any] = ()
        self._chosen: dict[str, int] = {}  # bits by name, if they are searched for

    @property
    def searches(self) -> bool:
        return self.bits == AUTO

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset(self.keep)

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"sharing", "quantization"}) - self.keeps

    def check_settings(self) -> None:
        check_auto("bits", self.bits, self.max_drop)
        bits = None if isinstance(self.bits, str) else self.bits
        widths: dict[str, int | None] = {"bits": bits, "activations": self.activations}
        widths |= {f"overrides.{pattern}": bits for pattern, bits in self.overrides.items()}
        for key, width in widths.items():
            if width is not None and width not in BITS:
                raise ConfigError(f"{key}={width}: it must be 2 to 8 bits")
        for what in self.keep:
            check_choice("keep", what, ("zeros", "sharing"))
        if not 0 < self.momentum <= 1:
            raise ConfigError(f"momentum={self.momentum}: it must be above 0 and at most 1")
        if "sharing" in self.keep and self.per_channel:
            raise ConfigError(
                "per_channel=true with keep=[sharing]: weights of one value would get several "
                "scales, and so several values; set per_channel=false"
            )
        check_min("samples", self.samples, 0)
        check_choice("ranges", self.ranges, RANGES)
        check_choice("rounding", self.rounding, ("nearest", "second_order"))
        if self.equalize and not self.samples:
            raise ConfigError(
                "equalize=true with samples=0: it is a part of the calibration; set samples=256"
            )
        if self.equalize and "sharing" in self.keep:
            raise ConfigError(
                "equalize=true with keep=[sharing]: weights of one value would get several values; "
                "set equalize=false"
            )
        if self.samples and "sharing" in self.keep and self.rounding == "second_order":
            raise ConfigError(
                "rounding=second_order with keep=[sharing]: weights of one value would get several "
                "values; set rounding=nearest"
            )
        if self.activations is not None and self.fit.epochs == 0 and not self.samples:
            raise ConfigError(
                f"activations={self.activations} with fit.epochs=0: the ranges are learned in "
                "training, or from samples; set samples=256, epochs, or activations=null"
            )
        if self.outputs and self.activations is None:
            raise ConfigError(f"outputs={self.outputs} with activations=null: set activations=8")
        self._own_layers()

    def check_model(self, model: nn.Module) -> None:
        if self.fold and "sharing" in self.keep and foldable(model):
            raise ConfigError(
                "fold=true with keep=[sharing]: folding batch norm gives each channel of a shared "
                "weight its own values; set fold=false"
            )
        self._rewrite(skeleton(model))

    def observe(self, model: nn.Module, world: World, inputs: Sequence[Any]) -> None:
        self._inputs = inputs

    def search(
        self, model: nn.Module, world: World, evaluate: Evaluate, dense: nn.Module | None
    ) -> list[str]:
        if not self.searches:
            return []
        limit = limit_for(model, evaluate, dense, self.max_drop)
        exact = copy_model(model)
        quantizers = self._rewrite(exact)
        world.barrier()  # no rank that is a thread may call a model while another one traces
        if self.equalize:
            equalize(exact, self._inputs[0], quantizers)
        sizes = {name: parameters(exact)[name][0].value.numel() for name in quantizers}
        fixed = match_patterns(self.overrides, sizes)

        def measure(bits: Mapping[str, int]) -> Metrics:
            rounded = copy_model(exact)
            places = parameters(rounded)
            made = {
                name: self._quantizer(places[name][0].value, number)
                for name, number in {**fixed, **bits}.items()
            }
            self._calibrate(rounded, made)
            for name, quantizer in made.items():  # calibration leaves some, such as embeddings
                weight = places[name][0].value.detach()
                weight.copy_(quantizer(weight))
            return evaluate(rounded)

        free = {name: size for name, size in sizes.items() if name not in fixed}
        self._chosen, line = search_bits(free, min(BITS), measure, limit)
        return [line]

    def state(self) -> Mapping[str, Any]:
        return {"bits": self._chosen}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._chosen = dict(state.get("bits", {}))

    def enter(self, model: nn.Module, world: World) -> None:
        quantizers = self._rewrite(model)
        places = parameters(model)
        if self.samples:
            world.barrier()  # no rank that is a thread may call a model while another one traces
            if self.equalize:
                equalize(model, self._inputs[0], quantizers)
        self._calibrate(model, quantizers)
        if self.samples:
            self._inputs = ()
            world.broadcast(places[name][0].value for name in places)
            _broadcast_ranges(model, world)
        world.broadcast(quantizer.scale for quantizer in quantizers.values())
        inner = surviving(model, world, self.keeps)
        made = {
            name: FakeQuant(quantizer, inner.get(name)) for name, quantizer in quantizers.items()
        }
        install(model, inner | made)

    @torch.no_grad()
    def _calibrate(self, model: nn.Module, quantizers: Mapping[str, WeightQuantizer]) -> None:
        """Set scales, and, if there are samples, weights, biases and ranges of inputs."""
        found = parameters(model)
        places = {name: found[name] for name in quantizers}
        if self.samples:
            calibrate(
                model,
                places,
                quantizers,
                self._inputs,
                self.ranges,
                self.rounding == "second_order",
                self.correct_bias,
            )
            return
        for name, quantizer in quantizers.items():
            quantizer.calibrate(places[name][0].value)

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

    def notices(self, model: nn.Module) -> list[str]:
        if UNSUPPORTED not in self.exempt:
            return []
        exempt = self._prepare(skeleton(model))[1]
        return [f"not quantized: {_list(exempt)}"] if exempt else []

    def _rewrite(self, model: nn.Module) -> dict[str, WeightQuantizer]:
        """Change the structure; return the quantizer of each weight. Raises ConfigError."""
        chosen, _ = self._prepare(model)
        default = MAX_BITS if isinstance(self.bits, str) else self.bits
        bits = dict.fromkeys(chosen, default) | self._chosen
        bits |= match_patterns(self.overrides, chosen)
        outputs = match_patterns(dict.fromkeys(self.outputs, True), chosen)
        made = {}
        for name, places in chosen.items():
            made[name] = self._quantizer(places[0].value, bits[name])
            for layer, attribute in places:
                attach(layer, attribute, made[name])
                if self.activations is None:
                    continue
                if not isinstance(layer, nn.Embedding) and not hasattr(layer, "input_quantizer"):
                    attach(layer, INPUT, ActivationQuantizer(self.activations))
                if name in outputs and not hasattr(layer, "output_quantizer"):
                    attach(layer, OUTPUT, ActivationQuantizer(self.activations))
        return made

    def _quantizer(self, weight: Tensor, bits: int) -> WeightQuantizer:
        return WeightQuantizer(bits, len(weight) if self.per_channel else None).to(weight.device)

    def _prepare(self, model: nn.Module) -> tuple[dict[str, list[ParameterRef]], dict[str, str]]:
        """Fold batch norm and rebuild layers, in place.

        Returns:
            The weights to quantize, and the unsupported ones that are exempt, with the reasons.

        Raises:
            ConfigError: A weight cannot be quantized, or none is left.
        """
        if self.fold:
            fold_batch_norms(model)
        rebuild(model)
        exempt = [pattern for pattern in self.exempt if pattern != UNSUPPORTED]
        chosen = select_weights(model, self.include, exempt)
        own = self._own_layers()
        reasons = {
            name: reason
            for name, places in chosen.items()
            if (reason := _unsupported(places, own)) is not None
        }
        if reasons and UNSUPPORTED not in self.exempt:
            raise ConfigError(
                f"these weights cannot be quantized: {_list(reasons)}; those of {SUPPORTED} can, "
                f"and those of classes in layers=[...]. Set exempt=[{_patterns(reasons)}], or "
                f"exempt=[{UNSUPPORTED}] for all of them"
            )
        if len(reasons) == len(chosen):
            raise ConfigError(f"exempt={[*self.exempt]}: no weight is left; none can be quantized")
        names = [name for name in chosen if name not in reasons]
        transpose(model, [module_of(name) for name in names if is_transposed(chosen[name][0][0])])
        places = weights(model)
        return {name: places[name] for name in names}, reasons

    def _own_layers(self) -> tuple[type[nn.Module], ...]:
        """The classes in `layers`. Raises ConfigError where one is none."""
        found = []
        for layer in self.layers:
            kind = locate("layers", {"_target_": layer}, {}) if isinstance(layer, str) else layer
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise ConfigError(
                    f"layers: {layer} is no class of layers; it must derive from torch.nn.Module"
                )
            found.append(kind)
        return tuple(found)


def _broadcast_ranges(model: nn.Module, world: World) -> None:
    """Rank 0's ranges on all ranks."""
    found = activation_quantizers(model)
    world.broadcast(quantizer.range for quantizer in found)
    for quantizer in found:
        quantizer.set_range(*quantizer.range)


def _unsupported(places: Sequence[ParameterRef], own: tuple[type[nn.Module], ...]) -> str | None:
    """The reason why a weight cannot be quantized; None: it can."""
    dtype = places[0].value.dtype
    for layer, attribute in places:
        kind = type(layer).__name__
        if attribute in (INPUT, OUTPUT):
            return f"a parameter of {kind} with a name that quantizers use"
        if is_transposed(layer) and len(places) > 1:
            return f"of {kind}, tied to another weight"
        builtin = attribute == "weight" and (isinstance(layer, LAYERS) or is_transposed(layer))
        if not (builtin or isinstance(layer, own)):
            return f"of {kind}"
    if dtype is not torch.float32:
        return f"{str(dtype).removeprefix('torch.')}; convert the model with .float()"
    return None


def _list(reasons: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({reason})" for name, reason in reasons.items())


def _patterns(names: Iterable[str]) -> str:
    """Patterns for `exempt` that match these weights."""
    return ", ".join(dict.fromkeys(module_of(name) or name for name in names))
