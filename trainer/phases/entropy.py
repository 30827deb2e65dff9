"""Training for size: the loss is that of the task plus lambda times the bits of the weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.compress.dependencies import Unit
from trainer.compress.entropy import EntropyCoded, entropy_coded
from trainer.compress.install import fold, install
from trainer.compress.parametrize import compression
from trainer.compress.rate import spread_of
from trainer.compress.select import ParameterRef, parameters, select_weights, vectors
from trainer.compress.state import model_state
from trainer.compress.unit_order import own_units, sort_units
from trainer.config import FitConfig, check_choice, check_min
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases.base import Phase
from trainer.phases.retrain import surviving

# Control of lambda: how often in a fit it is changed, by how much its logarithm grows over a whole
# fit if the file is too large by a factor of e, and the most by which it may grow. Sizes follow
# lambda within some percent of a fit, so that a larger gain would overshoot.
_CONTROLS, _GAIN, _MAX_RATE = 40, 8.0, 12.0
_ALLOWANCE = 2.0  # logarithm of how many times larger than the target a file may be at the start
_CODER_SECONDS = 0.5  # CPU time for the coder at each change, estimated


@dataclass
class EntropyPenalty(Phase):
    """Train weights on uniform grids with a penalty on the bits that they take in the file.

    The weights of a layer are integers times a step. The step is learned, and so are the integers:
    the task's loss sees the rounded weights and its gradient passes the rounding unchanged. The
    penalty is `size_weight` times the size of all integers by the rate model of
    trainer.compress.rate, whose costs are counted again every `refresh` steps. Sparsity, empty
    rows and columns, steps and integers result together. Oktay et al., ICLR 2020, arXiv:1906.06624.

    Needs an optimizer with adaptive rates, such as Adam: the steps of the grids have gradients of
    another size than the weights.

    Args:
        size_weight: Lambda: the loss, in nats, that a kilobyte (1,000 bytes) costs.
        bytes: Size of the model file at which training aims. Lambda then begins with `size_weight`
            and grows while the file is larger, or falls while it is smaller. None: it is constant
            after the ramp.
        ramp: Fraction of the steps in which lambda grows linearly from 0. With `bytes`, the one in
            which the aim falls to `bytes` from 7 times that size.
        step: First step of each grid, in root mean squares of the layer's weights.
        refresh: Optimizer steps after which the costs are counted again.
        vectors: Whether biases and norms are coded as well.
        sort_units: Whether the phase ends by sorting hidden units and channels, the fullest first
            (trainer.compress.unit_order): the order, on which the model does not depend, then
            takes no bytes.
        keep: Properties of the weights that are preserved: "zeros".
        include: Name patterns of the weights that are coded.
        exempt: Name patterns of weights that are excluded.
    """

    kind: ClassVar[str] = "entropy"
    makes: ClassVar[frozenset[str]] = frozenset({"zeros", "sharing"})

    size_weight: float = 0.02
    bytes: int | None = None
    ramp: float = 0.3
    step: float = 0.5
    refresh: int = 20
    vectors: bool = False
    sort_units: bool = False
    keep: list[str] = field(default_factory=lambda: ["zeros"])
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=1), kw_only=True)

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        super().__post_init__(epochs, lr)
        self._units: list[Unit] = []

    @property
    def samples(self) -> int:
        return 2 if self.sort_units else 0

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset(self.keep)

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"sharing", "quantization"})

    @property
    def ramps(self) -> bool:
        return True

    def check_settings(self) -> None:
        check_min("size_weight", self.size_weight, 0)
        check_min("bytes", self.bytes, 1)
        if self.bytes is not None and self.size_weight == 0:
            raise ConfigError(
                f"bytes={self.bytes} with size_weight=0: it is where the search for lambda "
                "begins; set it above 0"
            )
        check_min("ramp", self.ramp, 0)
        check_min("step", self.step, 0, excluded=True)
        check_min("refresh", self.refresh, 1)
        for what in self.keep:
            check_choice("keep", what, ("zeros",))

    def check_model(self, model: nn.Module) -> None:
        self._chosen(model)

    def observe(self, model: nn.Module, world: World, inputs: Sequence[Any]) -> None:
        self._units = own_units(model, inputs[0])

    def enter(self, model: nn.Module, world: World) -> None:
        chosen = self._chosen(model)
        inner = surviving(model, world, self.keeps)
        made = {}
        for name, places in chosen.items():
            weight = places[0].value.detach()
            spread = float(spread_of(weight, self.step))
            made[name] = EntropyCoded(weight, self.step * max(spread, 1e-6), inner.get(name))
        install(model, inner | made)
        world.broadcast(coded.log_step for coded, _ in entropy_coded(model))
        for coded, trainable in entropy_coded(model):
            coded.weight.fill_(0.0 if self.bytes is None else self._per_bit)
            coded.refresh(trainable)

    def penalty(self, model: nn.Module) -> Tensor | None:
        bits = [coded.weight * coded.bits(latent) for coded, latent in entropy_coded(model)]
        return torch.stack(bits).sum()

    def after_step(self, model: nn.Module, world: World, step: int, total: int) -> None:
        found = list(entropy_coded(model))
        if self.bytes is None:
            weight = self._per_bit * min(1.0, step / max(1.0, self.ramp * total))
        elif step % max(1, total // _CONTROLS) == 0:
            size = found[0][0].weight.new_tensor(_file_bytes(model) if world.rank == 0 else 0)
            world.broadcast([size])
            allowed = _ALLOWANCE * max(0.0, 1 - step / max(1.0, self.ramp * total))
            rate = _GAIN * (math.log(float(size) / self.bytes) - allowed)
            factor = math.exp(min(max(rate, -_MAX_RATE), _MAX_RATE) / _CONTROLS)
            weight = float(found[0][0].weight) * factor
        else:
            weight = float(found[0][0].weight)
        for coded, trainable in found:
            coded.weight.fill_(weight)
            if step % self.refresh == 0:
                coded.refresh(trainable)

    def leave(self, model: nn.Module) -> None:
        rounded = _rounded(model)
        fold(model)
        with torch.no_grad():
            for name, places in parameters(model).items():
                if name in rounded:
                    places[0].value.copy_(rounded[name])
        sort_units(model, self._units)

    @property
    def _per_bit(self) -> float:
        """`size_weight` per bit."""
        return self.size_weight / 8000

    def _chosen(self, model: nn.Module) -> dict[str, list[ParameterRef]]:
        chosen = select_weights(model, self.include, self.exempt)
        if self.vectors:
            chosen = chosen | vectors(model)
        return chosen


@torch.no_grad()
def _rounded(model: nn.Module) -> dict[str, Tensor]:
    """The coded weights by name, with steps that fp16 holds."""
    return {
        name: coded.integers(places[0].trainable) * coded.step.half().float() + 0.0  # no minus zero
        for name, places in parameters(model).items()
        if isinstance(coded := compression(*places[0]), EntropyCoded)
    }


@torch.no_grad()
def _file_bytes(model: nn.Module) -> int:
    """Bytes of the model file, if the phase ended now."""
    weights = {name: places[0].value for name, places in parameters(model).items()}
    others = {
        name: tensor
        for name, tensor in model_state(model).items()
        if "parametrizations." not in name and name not in weights
    }
    return len(artifact.encode(weights | _rounded(model) | others, max_seconds=_CODER_SECONDS))
