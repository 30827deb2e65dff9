"""Quantization after training, for size: integers times a step that take few bits in the file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.compress.layer_inputs import evaluation, observe_layers, with_inputs
from trainer.compress.rate import round_alone, spread_of
from trainer.compress.second_order import round_by_rate
from trainer.compress.select import select_weights
from trainer.compress.trellis import round_paths
from trainer.config import check_min
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases.base import Phase

# Significant bits of a step, as fp16 has them, and the largest weight in steps: fp32 holds all
# multiples of half of such a step.
_STEP_BITS, _MAX_STEPS = 11, 4095


@dataclass
class EntropyRound(Phase):
    """Round weights to integers times a step that take few bits in the file, without training.

    Labels are not used, only the inputs of some training samples. The layers are rounded in the
    order in which the model calls them, each with the inputs that it gets from the layers before
    it, which are rounded already. A weight that would take many bits is rounded towards zero, or
    pruned, where that costs little; the other weights of its output make up for the error
    (trainer.compress.second_order.round_by_rate). Weights that are not the matrix of one Linear or
    convolution, such as embeddings, are rounded one by one. Then the mean of each output is
    restored by a change of its bias.

    Args:
        step: Of the grid of each layer, in root mean squares of its weights. It decides the size.
            A layer whose largest weight would take more than 4095 steps gets a larger step, since
            fp32 does not hold all multiples of a smaller one.
        rate: What a bit costs: this times the mean error of a weight that is wrong by a step. 0:
            the nearest integers. Larger values with smaller steps give sparser weights.
        trellis: Whether the weights of a column are on two grids in turns, as the ones before
            them decide (trainer.compress.trellis): about as many bytes at a smaller error.
            Convolutions with groups are rounded without it. A later phase that changes weights,
            such as prune or retrain, breaks the paths, so that they take more bytes than without.
        samples: Number of training samples whose inputs are looked at.
        include: Name patterns of the weights that are rounded.
        exempt: Name patterns of weights that are excluded.
    """

    kind: ClassVar[str] = "entropy_round"
    makes: ClassVar[frozenset[str]] = frozenset({"zeros", "sharing"})

    step: float = 0.2
    rate: float = 0.1
    trellis: bool = False
    samples: int = 256
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        super().__post_init__(epochs, lr)
        self._inputs: Sequence[Any] = ()

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros"})

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"sharing", "quantization"})

    def check_settings(self) -> None:
        check_min("step", self.step, 0, excluded=True)
        check_min("rate", self.rate, 0)
        check_min("samples", self.samples, 1)
        if self.fit.epochs:
            raise ConfigError(
                f"fit.epochs={self.fit.epochs}: this phase trains nothing; add the phase retrain "
                "with keep=[zeros,sharing] after it, or train for size with the phase entropy"
            )

    def check_model(self, model: nn.Module) -> None:
        chosen = select_weights(model, self.include, self.exempt)
        wrong = [name for name, refs in chosen.items() if refs[0].value.dtype is not torch.float32]
        if wrong:
            raise ConfigError(
                f"{', '.join(wrong)}: only weights stored as float32 are rounded; convert the "
                "model with .float(), or name them in exempt"
            )

    def observe(self, model: nn.Module, world: World, inputs: Sequence[Any]) -> None:
        self._inputs = inputs

    @torch.no_grad()
    def enter(self, model: nn.Module, world: World) -> None:
        chosen = select_weights(model, self.include, self.exempt)
        with evaluation(model):
            observed = observe_layers(model, chosen, self._inputs)
            for name in chosen.keys() - observed.keys():
                weight = chosen[name][0].value
                step = self._step(weight)
                alone = round_paths if self.trellis else round_alone
                weight.copy_(alone(weight / step, self.rate) * step + 0.0)  # no minus zero
            for layers in with_inputs(model, observed, self._inputs, products=True):
                for name, layer in layers.items():
                    weight = chosen[name][0].value
                    trellis = self.trellis and getattr(layer.layer, "groups", 1) == 1
                    rounded = partial(_rounded, self._step(weight), self.rate, trellis)
                    with layer.rounding() as statistics:
                        statistics.replace(weight, rounded)
        self._inputs = ()
        world.broadcast(model.parameters())

    def _step(self, weight: Tensor) -> Tensor:
        """Of the grid of a weight, 0-dim; in the normal range of fp16, a value that fp16 holds."""
        spread, largest = spread_of(weight, self.step), weight.abs().max().double()
        mantissa, exponent = torch.frexp(torch.maximum(self.step * spread, largest / _MAX_STEPS))
        step = torch.ldexp((mantissa * 2**_STEP_BITS).round(), exponent - _STEP_BITS)
        return step.clamp_min(torch.finfo(torch.float32).tiny).float()


def _rounded(
    step: Tensor, rate: float, trellis: bool, block: Tensor, gram: Tensor, group: int
) -> Tensor:
    return round_by_rate(block, gram, step, rate, trellis) + 0.0  # no minus zero
