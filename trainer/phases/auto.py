"""The search behind sparsity=auto: prune a little, train, look, and go on or back."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.compress.allocation import Curve, allocate
from trainer.compress.masks import largest
from trainer.compress.select import Place
from trainer.engine.evaluate import Metrics
from trainer.messages import RoundRecord
from trainer.phases.base import Measure

FIRST = 0.5  # fraction of the weights that the first round keeps
LAST = 0.97  # a step that keeps more is not worth a round
PROBES = (0.7, 0.5, 0.3, 0.15)  # of a layer's weights: where its sensitivity is measured


@dataclass
class Search:
    """Where the search stands; the numbers are the same on all ranks."""

    max_drop: float  # of validation accuracy, a fraction
    rounds: int  # at most so many
    baseline: float = math.nan  # accuracy before the first round
    fraction: float = FIRST  # of the weights that the next round keeps
    targets: dict[str, int] = field(default_factory=dict)  # weights that each layer keeps in it
    exhausted: bool = False  # every layer is at its floor after it
    good: dict[str, Tensor] = field(default_factory=dict)  # the last state that was good enough
    history: list[RoundRecord] = field(default_factory=list)

    @torch.no_grad()
    def plan(
        self,
        model: nn.Module,
        layers: Mapping[str, list[Place]],
        floors: Mapping[str, int],
        measure: Measure,
    ) -> None:
        """Decide what the next round keeps of each layer, from where the model stands.

        Args:
            layers: the weights to prune, by name.
            floors: what each keeps at least.
            measure: called once for the model as it is, and once for each probe of each layer.
        """
        now = measure(model)
        if not self.good:
            self.baseline = now.accuracy
            self._keep(model)
        values = {name: places[0].value for name, places in layers.items()}
        kept = {name: int(value.count_nonzero()) for name, value in values.items()}
        curves: dict[str, Curve] = {}
        for name, value in values.items():
            before = value.clone()
            curve = []
            for fraction in PROBES:
                value.masked_fill_(~largest(before, round(fraction * kept[name])), 0)
                curve.append((fraction, measure(model).loss - now.loss))
                value.copy_(before)
            curves[name] = curve
        self.targets = allocate(kept, curves, floors, self.fraction)
        self.exhausted = all(self.targets[name] <= floors[name] for name in floors)

    def judge(self, model: nn.Module, metrics: Metrics, sparsity: float) -> RoundRecord:
        """Keep what a round came to, or put the model back to the last good state.

        Args:
            model: after the round, plain.
            metrics: of it on validation data.
            sparsity: of it.
        """
        accepted = metrics.accuracy >= self.baseline - self.max_drop - 1e-12
        said = f"{sparsity:.2%} sparse: accuracy {metrics.accuracy:.2%}"
        if accepted:
            self._keep(model)
        else:
            model.load_state_dict(self.good)
            self.fraction = math.sqrt(self.fraction)
            said += f" is below {self.baseline - self.max_drop:.2%}"
        number = len(self.history) + 1
        stopped = ""
        if self.fraction > LAST:
            stopped = f"{said}, and a smaller step would not be worth a round"
        elif accepted and self.exhausted:
            stopped = "every layer keeps as much as min_density asks for"
        elif number >= self.rounds:
            stopped = f"all {self.rounds} rounds are used up"
        record = RoundRecord(number, sparsity, metrics.accuracy, metrics.loss, accepted, stopped)
        self.history.append(record)
        return record

    def state(self) -> dict[str, Any]:
        """All that outlives an interruption."""
        return {
            "baseline": self.baseline,
            "fraction": self.fraction,
            "targets": self.targets,
            "exhausted": self.exhausted,
            "good": self.good,
            "history": [asdict(record) for record in self.history],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self.baseline, self.fraction = state["baseline"], state["fraction"]
        self.exhausted = state["exhausted"]
        self.targets, self.good = dict(state["targets"]), dict(state["good"])
        self.history = [RoundRecord(**record) for record in state["history"]]

    def _keep(self, model: nn.Module) -> None:
        self.good = {name: tensor.clone() for name, tensor in model.state_dict().items()}
