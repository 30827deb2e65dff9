"""The search behind sparsity=auto: prune a little, train, look, and go on or back."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compress.allocation import Curve, allocate
from trainer.compress.counts import counts
from trainer.compress.masks import largest
from trainer.compress.select import ParameterRef
from trainer.compress.state import load_state, model_state
from trainer.engine.evaluate import Metrics
from trainer.messages import RoundRecord
from trainer.phases.base import Measure
from trainer.phases.targets import Targets, floor

FIRST = 0.5  # fraction of the weights that the first round keeps
LAST = 0.97  # a step that keeps more is not worth a round
PROBES = (0.7, 0.5, 0.3, 0.15)  # of a layer's weights: where its sensitivity is measured


@dataclass
class Search(Targets):
    """Where the search stands; the numbers are the same on all ranks.

    A round that loses too much is trained once more without pruning, since survivors may need
    longer and accuracies scatter. If that does not help either, both are taken back, and the next
    round prunes less: the fraction that it keeps is the square root of the last one, and its square
    again after a round that held. A model that was put back is what it was before, bit for bit, and
    so is the sensitivity of its layers: it is not measured again.
    """

    max_drop: float  # of validation accuracy, a fraction
    rounds: int  # at most so many
    min_density: float  # smallest fraction that any layer keeps
    baseline: float = math.nan  # accuracy of the dense model
    fraction: float = FIRST  # of the weights that the next round keeps
    targets: dict[str, int] = field(default_factory=dict)  # weights that each layer keeps in it
    curves: dict[str, Curve] = field(default_factory=dict)  # by layer, of the last good state
    exhausted: bool = False  # every layer is at its floor after it
    idle: bool = False  # it has nothing to prune
    good: dict[str, Tensor] = field(default_factory=dict)  # the last state that was good enough
    short: dict[str, Tensor] = field(default_factory=dict)  # one that was not, and trains once more
    history: list[RoundRecord] = field(default_factory=list)

    @property
    def most_rounds(self) -> int:
        return self.rounds

    @torch.no_grad()
    def plan(
        self,
        model: nn.Module,
        layers: Mapping[str, list[ParameterRef]],
        measure: Measure,
        dense: nn.Module | None,
    ) -> None:
        values = {name: places[0].value for name, places in layers.items()}
        kept = {name: int(value.count_nonzero()) for name, value in values.items()}
        if self.short:
            self.targets = kept
            return
        floors = {name: floor(value.numel(), self.min_density) for name, value in values.items()}
        if not self.curves:
            now = measure(model)
            if not self.good:
                self.baseline = measure(dense).accuracy if dense is not None else now.accuracy
                self.good = _state(model)
            for name, value in values.items():
                before = value.clone()
                curve = []
                for fraction in PROBES:
                    value.masked_fill_(~largest(before, round(fraction * kept[name])), 0)
                    curve.append((fraction, measure(model).loss - now.loss))
                    value.copy_(before)
                self.curves[name] = curve
        self.targets = allocate(kept, self.curves, floors, self.fraction)
        self.exhausted = all(self.targets[name] <= floors[name] for name in floors)
        self.idle = self.targets == kept

    def begin(self, model: nn.Module) -> None:
        load_state(model, self.short or self.good)

    def keep(
        self, latent: Mapping[str, Tensor], present: Mapping[str, int], progress: float
    ) -> dict[str, int]:
        return self.targets

    def judge(self, model: nn.Module, metrics: Metrics) -> RoundRecord:
        """Keep what a round came to, or put the model back to the last good state."""
        sparsity = counts(model).sparsity
        accepted = metrics.accuracy >= self.baseline - self.max_drop - 1e-12
        said = f"{sparsity:.2%} sparse: accuracy {metrics.accuracy:.2%}"
        number = len(self.history) + 1
        if accepted:
            self.good, self.short = _state(model), {}
            self.curves = {}
            self.fraction = max(FIRST, self.fraction**2)
        elif not self.short and number < self.rounds and not self.idle:
            self.short = _state(model)
        else:
            load_state(model, self.good)
            self.short = {}
            self.fraction = math.sqrt(self.fraction)
            said += f" is below {self.baseline - self.max_drop:.2%}"
        stopped = ""
        if self.fraction > LAST:
            stopped = f"{said}, and a smaller step would not be worth a round"
        elif accepted and self.exhausted:
            stopped = "every layer keeps as much as min_density asks for"
        elif self.idle:
            stopped = "no layer has a weight left that a round could prune"
        elif number >= self.rounds:
            stopped = f"all {self.rounds} rounds are used up"
        record = RoundRecord(
            round=number,
            sparsity=sparsity,
            accuracy=metrics.accuracy,
            loss=metrics.loss,
            accepted=accepted,
            stopped=stopped,
            goes_on=bool(self.short),
        )
        self.history.append(record)
        return record

    def state(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline,
            "fraction": self.fraction,
            "targets": self.targets,
            "curves": self.curves,
            "exhausted": self.exhausted,
            "idle": self.idle,
            "good": self.good,
            "short": self.short,
            "history": [asdict(record) for record in self.history],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.baseline, self.fraction = state["baseline"], state["fraction"]
        self.exhausted, self.idle = state["exhausted"], state["idle"]
        self.targets = dict(state["targets"])
        self.good, self.short = dict(state["good"]), dict(state["short"])
        self.curves = {
            name: [(fraction, rise) for fraction, rise in curve]
            for name, curve in state["curves"].items()
        }
        self.history = [RoundRecord(**record) for record in state["history"]]


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model_state(model).items()}
