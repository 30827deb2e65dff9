"""Structured pruning: whole channels, hidden units and attention heads are removed."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.compress.allocation import Curve, allocate
from trainer.compress.counts import counts
from trainer.compress.dependencies import Unit
from trainer.compress.install import fold
from trainer.compress.layers import rebuild_attention
from trainer.compress.rewrite import skeleton
from trainer.compress.select import select_weights, weights
from trainer.compress.slicing import find_units, remove, to_change
from trainer.config import check_choice, check_min
from trainer.config.drop import is_worse
from trainer.data.tree import call_with, first_samples, tensors
from trainer.engine.cost import macs
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError, Diverged, RunError
from trainer.metrics import format_metric
from trainer.models.copying import copy_model
from trainer.phases.auto import AUTO, check_auto, limit_for
from trainer.phases.auto_prune import PROBES
from trainer.phases.base import STRUCTURE, Evaluate, StructuralPhase
from trainer.phases.retrain import preserve

_SAMPLES = 2  # of the forward passes in which units are found and tried
_PRECISION = 0.01  # of the fraction of units that a search keeps
_TRAINED_PRECISION = 0.05  # likewise, if each step of the search trains
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
        remaining: Largest fraction of the cost that remains, in (0, 1). "auto": as many units are
            removed, from each layer according to its measured sensitivity, as the first metric on
            validation data stays within `max_drop` at the end of the phase. With `fit.epochs`, the
            phase is tried about five times, training included, with more units or fewer, and the
            best of these is repeated.
        cost: "macs": multiply-accumulates by weights that are not zero. "parameters". "latency":
            measured on rank 0 with PyTorch, for one sample, so that equal runs may differ.
        scope: "global": the units of all layers compete. "layer": each layer loses the same
            fraction of its units.
        min_kept: Smallest fraction of its units that a layer keeps, in [0, 1]; at least one.
        multiple: The number of units that a layer keeps is rounded up to a multiple of this.
        include: Name patterns of weights whose channels may be removed.
        exempt: Name patterns of weights that are excluded, with their inputs and outputs.
        max_drop: With `remaining="auto"`: how much worse than the dense model's the first metric
            may be at the end of the phase. None: the phase's share of the limit of the experiment.
            If later phases train the smaller model, more may be allowed here.
    """

    kind: ClassVar[str] = "structured_prune"
    makes: ClassVar[frozenset[str]] = frozenset({STRUCTURE})

    remaining: float | str = 0.5
    cost: str = "macs"
    scope: str = "global"
    min_kept: float = 0.1
    multiple: int = 1
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)
    max_drop: Any = None

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        super().__post_init__(epochs, lr)
        self._inputs: Any = None
        self._found: dict[str, Any] | None = None  # the change, if it is searched for

    @property
    def searches(self) -> bool:
        return self.remaining == AUTO

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
        check_auto("remaining", self.remaining, self.max_drop)
        if not isinstance(self.remaining, str) and not 0 < self.remaining < 1:
            raise ConfigError(f"remaining={self.remaining}: it must be above 0 and below 1")
        if not 0 <= self.min_kept <= 1:
            raise ConfigError(f"min_kept={self.min_kept}: it must be between 0 and 1")
        check_min("multiple", self.multiple, 1)

    def check_model(self, model: nn.Module) -> None:
        rebuild_attention(sample := skeleton(model))
        select_weights(sample, self.include, self.exempt)

    def check_inputs(self, model: nn.Module, inputs: Any) -> None:
        search = _Search(self, model, inputs)
        if self.cost != "latency" and not self.searches:
            search.check_target()

    def observe(self, model: nn.Module, world: World, inputs: Sequence[Any]) -> None:
        self._inputs = inputs[0]

    def search(
        self, model: nn.Module, world: World, evaluate: Evaluate, dense: nn.Module | None
    ) -> Iterator[str]:
        if not self.searches or self._found is not None:
            return
        assert self._inputs is not None  # observe() was called
        limit = limit_for(model, evaluate, dense, self.max_drop)
        search = _Search(self, model, self._inputs)
        self._found = yield from search.by_sensitivity(evaluate, limit)

    def with_change(self, change: dict[str, Any]) -> "StructuredPrune":
        """This phase as it is after the search has found a change."""
        found = replace(self)
        found._found = change
        return found

    def plan_change(self, model: nn.Module, world: World) -> dict[str, Any]:
        assert self._inputs is not None  # observe() was called
        if self.searches:  # what `search` found; nothing where it was not called
            return self._found or to_change(model, [], [])
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
        self._original = model
        self._sample = first_samples(inputs, 1)
        self._model, self._units, refused = find_units(model, inputs)
        chosen = select_weights(self._model, phase.include, phase.exempt)
        exempt = weights(self._model).keys() - chosen.keys()
        self._layers: Layers = {}
        for unit in self._units:
            if not exempt & {part.name for part in unit.parts}:
                self._layers.setdefault(unit.dimensions, []).append(unit)
        if not self._layers:
            why = "; others belong to inputs, outputs, or layers that cannot become smaller"
            if refused:
                why = f"; of {len(refused)} that were tried, the first: {refused[0]}"
            raise ConfigError(
                f"no channel of {type(model).__name__} can be removed with "
                f"include={[*phase.include]}, exempt={[*phase.exempt]}{why}"
            )
        self._sizes = [len(found) for found in self._layers.values()]
        self._order = self._by_score()

    def check_target(self) -> None:
        """Raise ConfigError if the target cannot be reached."""
        least = self._fraction(self._removed(len(self._order)))
        if least > float(self._phase.remaining):
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

    def by_sensitivity(
        self, evaluate: Evaluate, limit: float
    ) -> Generator[str, None, dict[str, Any]]:
        """As `plan`, with as many units removed as the first metric stays within a limit.

        Each layer loses units as far as its own curve allows (`trainer.compress.allocation`).

        Yields:
            Lines that report the search.
        """
        trains = bool(self._phase.fit.epochs)
        sizes = dict(enumerate(self._sizes))
        exact = evaluate(self._model)
        curves: dict[int, Curve] = {}
        for layer, size in sizes.items():
            probes = [self._units_beyond({layer: round(fraction * size)}) for fraction in PROBES]
            rises = [evaluate(self._without(units)).loss - exact.loss for units in probes]
            curves[layer] = list(zip(PROBES, rises, strict=True))
        floors = {layer: self._floor(layer) for layer in sizes}
        removed: list[Unit] = []
        tried: dict[tuple[int, ...], Metrics | None] = {(): exact}  # by the units removed
        best, low, high = exact, 0.0, 1.0  # fractions of the units: beyond the limit, within it
        while high - low > (_TRAINED_PRECISION if trains else _PRECISION):
            middle = (low + high) / 2
            kept = allocate(sizes, curves, floors, middle)
            beyond = self._units_beyond(kept)
            key = tuple(id(unit) for unit in beyond)
            if key not in tried:
                tried[key] = yield from self._try(beyond, evaluate, limit)
            metrics = tried[key]
            if metrics is None or is_worse(metrics.first, limit, metrics.direction):
                low = middle
            else:
                high, best, removed = middle, metrics, beyond
        if trains and not removed:
            yield (
                f"no unit is removed: no smaller model that was tried is within the limit, "
                f"{format_metric(exact.name, limit)}, after training"
            )
        else:
            yield self._report(removed, best, limit)
        return to_change(self._model, removed, self._units)

    def _try(
        self, removed: Sequence[Unit], evaluate: Evaluate, limit: float
    ) -> Generator[str, None, Metrics | None]:
        """Measure the model without these units, trained if the phase trains.

        Yields:
            A line about the training.

        Returns:
            The metrics; None: the training diverged.
        """
        if not self._phase.fit.epochs:
            return evaluate(self._without(removed))
        change = to_change(self._model, removed, self._units)
        try:
            metrics = evaluate(self._original, self._phase.with_change(change))
        except Diverged as error:
            yield f"trying {self._amount(removed)}: {error}"
            return None
        yield f"trying {self._report(removed, metrics, limit)}"
        return metrics

    def _amount(self, removed: Sequence[Unit]) -> str:
        """What is removed and what remains, in words."""
        return (
            f"{len(removed)} of {sum(self._sizes)} units removed, {self._fraction(removed):.1%} of "
            f"the {self._phase.cost} remain"
        )

    def _report(self, removed: Sequence[Unit], metrics: Metrics, limit: float) -> str:
        name = metrics.name
        return (
            f"{self._amount(removed)}, {name} {format_metric(name, metrics.first)} "
            f"{'after' if self._phase.fit.epochs else 'without'} training, the limit is "
            f"{format_metric(name, limit)}"
        )

    def _without(self, removed: Sequence[Unit]) -> nn.Module:
        """A copy of the model without these units."""
        model = copy_model(self._model)
        remove(model, to_change(self._model, removed, self._units))
        return model

    def _reached(self, count: int, world: World) -> bool:
        """Whether the target is reached without `count` units. Rank 0 alone measures it."""
        remaining = float(self._phase.remaining)
        reached = world.rank == 0 and self._fraction(self._removed(count)) <= remaining
        decision = torch.tensor(reached, device=world.device)
        world.broadcast([decision])
        return bool(decision)

    def _unreachable(self, least: float) -> str:
        return (
            f"remaining={self._phase.remaining}: with min_kept={self._phase.min_kept} and "
            f"multiple={self._phase.multiple}, {least:.1%} of the {self._phase.cost} remain; "
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
        lost = Counter(layer for layer, _ in self._order[:count])
        return self._units_beyond({layer: self._sizes[layer] - n for layer, n in lost.items()})

    def _units_beyond(self, kept: Mapping[int, int]) -> list[Unit]:
        """The units of smallest score, so that layers keep so many, and what they have to keep."""
        multiple = self._phase.multiple
        left = {}
        for layer, number in kept.items():
            size, least = self._sizes[layer], max(self._floor(layer), number)
            left[layer] = size - min(size, -(-least // multiple) * multiple)
        removed = []
        for layer, unit in self._order:
            if left.get(layer, 0) > 0:
                left[layer] -= 1
                removed.append(unit)
        return removed

    def _floor(self, layer: int) -> int:
        """How many units a layer keeps at least."""
        return max(1, math.ceil(self._phase.min_kept * self._sizes[layer]))

    def _fraction(self, removed: Sequence[Unit]) -> float:
        """The fraction of the cost that remains without these units."""
        model = copy_model(self._model)
        remove(model, to_change(self._model, removed, self._units))
        if self._phase.cost == "latency":
            return _latency_ratio(model, self._model, self._sample)
        if self._phase.cost == "parameters":
            return counts(model).parameters / counts(self._model).parameters
        return macs(model, self._sample) / self._macs

    @cached_property
    def _macs(self) -> int:
        """Multiply-accumulates of the model without any removal."""
        return macs(self._model, self._sample)


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
