"""The search for the highest sparsity at which a model keeps the first metric of its task."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from trainer.compress.allocation import Curve, allocate
from trainer.compress.counts import counts
from trainer.compress.install import fold
from trainer.compress.masks import largest
from trainer.compress.select import select_weights
from trainer.compress.state import load_state, model_state
from trainer.config import FitConfig, check_min
from trainer.config.drop import check_drop, is_worse, worst_allowed
from trainer.engine.evaluate import Metrics
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.messages import RoundRecord
from trainer.metrics import MAXIMIZE, format_metric
from trainer.phases.auto import AUTO
from trainer.phases.base import Evaluate, Phase, RoundPhase
from trainer.phases.prune import Prune, check_min_density, min_kept, prune_weights
from trainer.phases.retrain import preserve

FIRST_FRACTION = 0.5  # of the weights, kept by the first round
LAST_FRACTION = 0.97  # a round that would keep more than this is not worth its training
PROBES = (0.7, 0.5, 0.3, 0.15)  # fractions of a layer's weights at which sensitivity is measured


@dataclass
class _Search:
    """The state of a search; the same on all ranks."""

    baseline: float = math.nan  # first metric of the dense model
    fraction: float = FIRST_FRACTION  # of the weights that the next round keeps
    targets: dict[str, int] = field(default_factory=dict)  # weights kept by each layer
    curves: dict[str, Curve] = field(default_factory=dict)  # sensitivity of each layer
    exhausted: bool = False  # with these targets, every layer is at its minimum density
    idle: bool = False  # the targets prune nothing
    accepted: dict[str, Tensor] = field(default_factory=dict)  # weights of the last accepted round
    pending: dict[str, Tensor] = field(default_factory=dict)  # below the limit, trained once more
    history: list[RoundRecord] = field(default_factory=list)


@dataclass
class AutoPrune(RoundPhase):
    """Prune and retrain in rounds, as far as the first metric stays close to the dense model's.

    Each round prunes the layers by their sensitivity: those whose loss rises most when they are
    pruned alone keep most of their weights. A round whose metric is beyond the limit is trained
    once more without pruning, since survivors may need longer and metrics scatter. If that does
    not help, both rounds are undone, and the next one prunes less: the fraction of weights that it
    keeps is the square root of the previous one, and its square again after an accepted round. The
    phase ends in the last accepted state.

    The search ends at the limit on validation data, and other data may fall below it: if the test
    set must stay within `limits.max_accuracy_drop`, choose a smaller `max_drop`.

    Args:
        max_drop: How much worse than the dense model's the first metric of the task may be on
            validation data: a number in its unit, such as a fraction for accuracy, or a percentage
            of the dense model's value, such as "5%". None: the phase's share of the limit of the
            experiment.
        rounds: Largest number of rounds; each trains for `fit.epochs`.
        min_density: Smallest fraction of its weights that any layer keeps, in [0, 1].
        include: Name patterns of the weights to prune.
        exempt: Name patterns of weights that are excluded.
    """

    kind: ClassVar[str] = "auto_prune"
    makes: ClassVar[frozenset[str]] = frozenset({"zeros"})

    max_drop: Any = None
    rounds: int = 15
    min_density: float = 0.01
    include: list[str] = field(default_factory=lambda: ["*"])
    exempt: list[str] = field(default_factory=list)
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=1), kw_only=True)

    def __post_init__(self, epochs: int | None, lr: float | None) -> None:
        super().__post_init__(epochs, lr)
        self._search = _Search()

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros"})

    @property
    def searches(self) -> bool:
        return True

    @property
    def max_rounds(self) -> int:
        return self.rounds

    def check_settings(self) -> None:
        check_drop("max_drop", self.max_drop)
        check_min("rounds", self.rounds, 1)
        check_min_density(self.min_density)
        if self.fit.epochs == 0:
            raise ConfigError("fit.epochs=0: each round trains; set epochs")

    def check_model(self, model: nn.Module) -> None:
        select_weights(model, self.include, self.exempt)

    def plan_round(
        self, model: nn.Module, world: World, evaluate: Evaluate, dense: nn.Module | None
    ) -> None:
        search = self._search
        values = self._values(model)
        kept = {name: int(value.count_nonzero()) for name, value in values.items()}
        if search.pending:
            search.targets = kept
            return
        if not search.curves:
            now = evaluate(model)
            if not search.accepted:
                search.baseline = (evaluate(dense) if dense is not None else now).first
                search.accepted = _copy_state(model)
            search.curves = {
                name: _sensitivity(model, value, kept[name], evaluate, now.loss)
                for name, value in values.items()
            }
        floors = {name: min_kept(value.numel(), self.min_density) for name, value in values.items()}
        search.targets = allocate(kept, search.curves, floors, search.fraction)
        search.exhausted = all(search.targets[name] <= floors[name] for name in floors)
        search.idle = search.targets == kept

    def enter(self, model: nn.Module, world: World) -> None:
        search = self._search
        load_state(model, search.pending or search.accepted)
        values = self._values(model)
        masks = {name: largest(value, search.targets[name]) for name, value in values.items()}
        prune_weights(values, masks, world)
        preserve(model, world)

    def leave(self, model: nn.Module) -> None:
        fold(model)

    def end_round(self, model: nn.Module, world: World, metrics: Metrics) -> RoundRecord:
        """Accept the round, train it once more, or restore the last accepted weights."""
        assert self.max_drop is not None
        search = self._search
        sparsity = counts(model).sparsity
        limit = worst_allowed(search.baseline, self.max_drop, metrics.direction)
        accepted = not is_worse(metrics.first, limit, metrics.direction, rounding=1e-12)
        number = len(search.history) + 1
        if accepted:
            search.accepted, search.pending = _copy_state(model), {}
            search.curves = {}
            search.fraction = max(FIRST_FRACTION, search.fraction**2)
        elif not search.pending and number < self.rounds and not search.idle:
            search.pending = _copy_state(model)
        else:
            load_state(model, search.accepted)
            search.pending = {}
            search.fraction = math.sqrt(search.fraction)
        stopped = ""
        if search.fraction > LAST_FRACTION:
            stopped = (
                f"{sparsity:.2%} sparse: {metrics.name} "
                f"{format_metric(metrics.name, metrics.first)} is "
                f"{'below' if metrics.direction == MAXIMIZE else 'above'} "
                f"{format_metric(metrics.name, limit)}, and a smaller step would not be worth a "
                "round"
            )
        elif accepted and search.exhausted:
            stopped = "every layer has reached min_density"
        elif search.idle:
            stopped = "no layer has a weight that a round could prune"
        elif number >= self.rounds:
            stopped = f"all {self.rounds} rounds are used up"
        record = RoundRecord(
            round=number,
            sparsity=sparsity,
            metrics=metrics.values,
            loss=metrics.loss,
            accepted=accepted,
            stopped=stopped,
            extended=bool(search.pending),
        )
        search.history.append(record)
        return record

    def state(self) -> Mapping[str, Any]:
        plain = {key: value for key, value in vars(self._search).items() if key != "history"}
        return {**plain, "history": [dict(vars(record)) for record in self._search.history]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._search = _Search(
            **{
                **state,
                "curves": {
                    name: [(fraction, rise) for fraction, rise in curve]
                    for name, curve in state["curves"].items()
                },
                "history": [RoundRecord(**record) for record in state["history"]],
            }
        )

    def _values(self, model: nn.Module) -> dict[str, Tensor]:
        """The weights to prune, by name. Raises ConfigError for a pattern that matches none."""
        chosen = select_weights(model, self.include, self.exempt)
        return {name: places[0].value.detach() for name, places in chosen.items()}


def expand(phase: Phase) -> Phase:
    """Replace the shorthand `Prune(sparsity="auto")` by the equivalent `AutoPrune`.

    Raises:
        ConfigError: A setting of `Prune` that has no meaning for `AutoPrune` is set.
    """
    if not isinstance(phase, Prune) or phase.sparsity != AUTO:
        return phase
    if (phase.schedule, phase.scope, phase.overrides) != ("oneshot", "layer", {}):
        raise ConfigError(
            f"sparsity=auto with schedule={phase.schedule}, scope={phase.scope}, overrides="
            f"{phase.overrides}: each round prunes at its start, each layer by its sensitivity; "
            "set schedule=oneshot, scope=layer and no overrides"
        )
    try:
        return AutoPrune(
            max_drop=phase.max_drop,
            rounds=phase.rounds,
            min_density=phase.min_density,
            include=phase.include,
            exempt=phase.exempt,
            fit=phase.fit,
        )
    except ConfigError as error:
        raise ConfigError(f"sparsity=auto with {error}") from error


@torch.no_grad()
def _sensitivity(
    model: nn.Module, weight: Tensor, kept: int, evaluate: Evaluate, loss: float
) -> Curve:
    """The increase of the loss when only `weight` is pruned, for each fraction of `PROBES`.

    Args:
        weight: A weight of `model`; it is restored afterwards.
        kept: Number of its values that are not zero.
        loss: Of the model as it is.
    """
    before = weight.clone()
    curve = []
    for fraction in PROBES:
        weight.masked_fill_(~largest(before, round(fraction * kept)), 0)
        curve.append((fraction, evaluate(model).loss - loss))
        weight.copy_(before)
    return curve


def _copy_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model_state(model).items()}
