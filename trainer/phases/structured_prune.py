"""Structured pruning: whole channels, hidden units and attention heads are removed."""

import copy
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.compress.counts import counts
from trainer.compress.dependencies import Unit
from trainer.compress.install import fold
from trainer.compress.layers import rebuild_attention
from trainer.compress.rewrite import skeleton
from trainer.compress.select import select_weights, weights
from trainer.compress.slicing import find_units, remove, to_change
from trainer.config import check_choice, check_min
from trainer.data.tree import call_with, map_tensors, tensors
from trainer.engine.cost import macs
from trainer.engine.world import World
from trainer.errors import ConfigError, Diverged, RunError
from trainer.phases.base import STRUCTURE, StructuralPhase
from trainer.phases.retrain import preserve

_SAMPLES = 2  # of the forward passes in which units are found and tried
_TIMINGS = 15  # forward passes of each model whose latency is measured

Layers = dict[frozenset[tuple[str, int]], list[Unit]]


@dataclass
class StructuredPrune(StructuralPhase):
    """Remove channels, hidden units and attention heads, so that a smaller model remains.

    The model is faster in any runtime, without support for sparse weights. A unit is removed with
    everything that belongs to it: the filter, the entries of batch norm, the inputs of the next
    layers, and the same channel of every layer whose output is added to it
    (trainer.compress.dependencies). Units that are normalized together by layer norm or group norm
    stay, and so do the model's inputs and outputs. Each layer that could become smaller is tried
    before training; one whose code does not allow it, such as a fixed size in a reshape, is left
    as it is.

    The units of smallest norm are removed until the target is reached. The norm of a unit is that
    of its slices in all weights, each in proportion to the mean over the layer. (Li et al., ICLR
    2017, arXiv:1608.08710; the sum over coupled layers: Fang et al., DepGraph, CVPR 2023,
    arXiv:2301.12900.) Train or retrain afterwards. MultiheadAttention that loses heads is rebuilt
    from Linear layers, so that its weights get names such as "attention.in_proj.weight", which
    patterns must use.

    Args:
        remaining: Largest fraction of the cost that remains, in (0, 1).
        cost: "macs": multiply-accumulates by weights that are not zero. "parameters". "latency":
            measured on rank 0 with PyTorch, for one sample, so that equal runs may differ.
        scope: "global": the units of all layers compete. "layer": each layer loses the same
            fraction of its units.
        min_kept: Smallest fraction of its units that a layer keeps, in [0, 1]; at least one.
        multiple: The number of units that a layer keeps is rounded up to a multiple of this.
        include: Name patterns of weights whose channels may be removed.
        exempt: Name patterns of weights that are excluded, with their inputs and outputs.
    """

    kind: ClassVar[str] = "structured_prune"
    makes: ClassVar[frozenset[str]] = frozenset({STRUCTURE})

    remaining: float = 0.5
    cost: str = "macs"
    scope: str = "global"
    min_kept: float = 0.1
    multiple: int = 1
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        super().__post_init__(epochs, lr)
        self._inputs: Any = None

    @property
    def samples(self) -> int:
        return _SAMPLES

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros", "sharing"})

    @property
    def destroys(self) -> frozenset[str]:
        return frozenset({"quantization"})

    def check_settings(self) -> None:
        check_choice("cost", self.cost, ("macs", "parameters", "latency"))
        check_choice("scope", self.scope, ("global", "layer"))
        if not 0 < self.remaining < 1:
            raise ConfigError(f"remaining={self.remaining}: it must be above 0 and below 1")
        if not 0 <= self.min_kept <= 1:
            raise ConfigError(f"min_kept={self.min_kept}: it must be between 0 and 1")
        check_min("multiple", self.multiple, 1)

    def check_model(self, model: nn.Module) -> None:
        rebuild_attention(sample := skeleton(model))
        select_weights(sample, self.include, self.exempt)

    def check_inputs(self, model: nn.Module, inputs: Any) -> None:
        search = _Search(self, model, inputs)
        if self.cost != "latency":
            search.check_target()

    def observe(self, model: nn.Module, world: World, inputs: Sequence[Any]) -> None:
        self._inputs = inputs[0]

    def plan_change(self, model: nn.Module, world: World) -> dict[str, Any]:
        assert self._inputs is not None  # observe() was called
        return _Search(self, model, self._inputs).plan(world)

    @staticmethod
    def apply_change(model: nn.Module, change: dict[str, Any]) -> None:
        remove(model, change)

    def enter(self, model: nn.Module, world: World) -> None:
        if self.fit.epochs:
            preserve(model, world, self.keeps)

    def leave(self, model: nn.Module) -> None:
        fold(model)


class _Search:
    """Looks for the smallest number of units whose removal reaches the target.

    Args:
        phase: The phase with its settings.
        model: The model, which stays as it is.
        inputs: Two samples [2, ...], on the model's device; several inputs in a tuple or mapping.
    """

    def __init__(self, phase: StructuredPrune, model: nn.Module, inputs: Any) -> None:
        self._phase = phase
        self._sample = map_tensors(lambda tensor: tensor[:1], inputs)
        self._model, self._units, refused = find_units(model, inputs)
        chosen = select_weights(self._model, phase.include, phase.exempt)
        exempt = weights(self._model).keys() - chosen.keys()
        self._layers: Layers = {}
        for unit in self._units:
            if not exempt & {part.name for part in unit.parts}:
                self._layers.setdefault(unit.dimensions, []).append(unit)
        if not self._layers:
            tried = (
                f"; of {len(refused)} that were tried, the first: " + refused[0] if refused else ""
            )
            raise ConfigError(
                f"no channel of {type(model).__name__} can be removed with "
                f"include={[*phase.include]}, exempt={[*phase.exempt]}{tried}"
            )
        self._sizes = [len(found) for found in self._layers.values()]
        self._order = self._by_score()

    def check_target(self) -> None:
        """Raise ConfigError if the target cannot be reached."""
        least = self._fraction(self._removed(len(self._order)))
        if least > self._phase.remaining:
            raise ConfigError(self._unreachable(least))

    def plan(self, world: World) -> dict[str, Any]:
        """Arguments for `trainer.compress.slicing.remove`; the same on all ranks."""
        low, high = 0, len(self._order)  # the target is reached with `high` units, not with `low`
        if not self._reached(high, world):
            raise RunError(self._unreachable(self._fraction(self._removed(high))))
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._reached(middle, world) else (middle, high)
        return to_change(self._model, self._removed(high), self._units)

    def _reached(self, count: int, world: World) -> bool:
        """Whether the target is reached without `count` units. Rank 0 decides."""
        reached = self._fraction(self._removed(count)) <= self._phase.remaining
        decision = torch.tensor(reached, device=world.device)
        world.broadcast([decision])
        return bool(decision)

    def _unreachable(self, least: float) -> str:
        return (
            f"remaining={self._phase.remaining}: with min_kept={self._phase.min_kept} and "
            f"multiple={self._phase.multiple}, {least:.3g} of the {self._phase.cost} remain; "
            "raise remaining, or lower min_kept"
        )

    def _by_score(self) -> list[tuple[int, Unit]]:
        """The units with the numbers of their layers, those to be removed first."""
        scored: list[tuple[float, int, int, Unit]] = []
        values = {
            name: places[0].value.detach().double() for name, places in weights(self._model).items()
        }
        for layer, found in enumerate(self._layers.values()):
            scores = _norms(found, values)
            if self._phase.scope == "layer":
                ranks = scores.argsort(stable=True).argsort(stable=True)
                scores = (ranks + 1) / len(found)
            scored += [
                (score, layer, place, unit)
                for place, (score, unit) in enumerate(zip(scores.tolist(), found, strict=True))
            ]
        return [(layer, unit) for _, layer, _, unit in sorted(scored, key=lambda row: row[:3])]

    def _removed(self, count: int) -> list[Unit]:
        """The first `count` units, without those that their layers have to keep."""
        phase = self._phase
        lost: dict[int, list[Unit]] = {}
        for layer, unit in self._order[:count]:
            lost.setdefault(layer, []).append(unit)
        removed = []
        for layer, units in lost.items():
            size = self._sizes[layer]
            kept = max(1, math.ceil(phase.min_kept * size), size - len(units))
            kept = min(size, -(-kept // phase.multiple) * phase.multiple)
            removed += units[: size - kept]
        return removed

    def _fraction(self, removed: Sequence[Unit]) -> float:
        """The fraction of the cost that remains without these units."""
        model = copy.deepcopy(self._model)
        remove(model, to_change(self._model, removed, self._units))
        if self._phase.cost == "latency":
            return _latency_ratio(model, self._model, self._sample)
        if self._phase.cost == "parameters":
            return counts(model).parameters / counts(self._model).parameters
        return macs(model, self._sample) / macs(self._model, self._sample)


def _norms(units: Sequence[Unit], values: Mapping[str, Tensor]) -> Tensor:
    """The norm of each unit of a layer: float64 [units], 1 on average.

    Args:
        units: Units of the same dimensions.
        values: Weights by name.
    """
    total = torch.zeros(len(units), dtype=torch.float64)
    number = 0
    for place, part in enumerate(units[0].parts):
        if part.name not in values:
            continue
        weight = values[part.name]
        squares = weight.movedim(part.dim, 0).flatten(1).square().sum(1)
        own = [squares[list(unit.parts[place].positions)].sum().sqrt() for unit in units]
        norms = torch.stack(own).cpu()
        if not bool(norms.isfinite().all()):
            raise Diverged("weights are Inf or NaN: the training before the pruning diverged")
        total += norms / norms.mean().clamp_min(1e-30)
        number += 1
    return total / max(1, number)


@torch.no_grad()
def _latency_ratio(one: nn.Module, other: nn.Module, sample: Any) -> float:
    """Median seconds of a forward pass of one model, divided by those of another."""
    seconds: tuple[list[float], list[float]] = ([], [])
    first = next(tensors(sample))
    for _ in range(_TIMINGS):
        for model, own in zip((one, other), seconds, strict=True):  # in turns: the load may change
            model.eval()
            begin = time.perf_counter()
            call_with(model, sample)
            if first.is_cuda:
                torch.cuda.synchronize(first.device)
            own.append(time.perf_counter() - begin)
    return statistics.median(seconds[0]) / statistics.median(seconds[1])
