"""The contract of phases: shipped ones keep it, and each way to break it is found."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from trainer.compress.install import fold
from trainer.compress.select import weights
from trainer.config import FitConfig
from trainer.errors import ConfigError
from trainer.phases import (
    AutoPrune,
    EntropyPenalty,
    EntropyRound,
    Phase,
    Prune,
    Quantize,
    Retrain,
    Share,
    StructuralPhase,
    Train,
)
from trainer.testing import ExampleNet, check_phase, check_structural_phase

BOTH = ["zeros", "sharing"]


@pytest.mark.parametrize(
    ("phase", "refused"),
    [
        (Train(epochs=2), []),
        (Prune(0.9, epochs=2), [{"sparsity": 1}, {"scope": "net"}]),
        (Prune(0.9, schedule="cubic", interval=1, epochs=2), [{"begin": 0.8}, {"interval": 0}]),
        (Prune(0.5), []),
        (Prune("1:2", epochs=2), [{"sparsity": s} for s in ("2:2", "0:4", "few", 124)]),
        (Prune(0.5, saliency="sparsegpt", samples=16, epochs=1), [{"samples": 0}]),
        (AutoPrune(0.3, 3), [{"max_drop": -1}, {"rounds": 0}]),
        (Share("auto", max_drop=0.3, epochs=1), [{"bits": "few"}, {"max_drop": "x"}]),
        (
            Quantize("auto", max_drop=0.3, samples=16, epochs=1),
            [{"bits": "few"}, {"rounding": "cubic"}],
        ),
        (Retrain(epochs=2), [{"keep": ["shape"]}]),
        (Retrain(BOTH, epochs=2), []),
        (Share(3, biases=2, epochs=2), [{"bits": 17}, {"clusters": {"*": 0}}]),
        (Share(3), []),
        (EntropyPenalty(0.5, vectors=True, refresh=1, epochs=2), [{"ramp": -1}, {"keep": ["x"]}]),
        (EntropyPenalty(0.5, bytes=900, sort_units=True, keep=[], epochs=2), [{"bytes": 0}]),
        (EntropyPenalty(keep=[]), [{"step": 0}, {"refresh": 0}, {"size_weight": -1}]),
        (EntropyRound(samples=16, trellis=True), []),
        (EntropyRound(samples=16), [{"step": 0}, {"rate": -1}, {"samples": 0}]),
        (Quantize(4, epochs=2), [{"bits": 9}, {"outputs": ["*"], "activations": None}]),
        (Quantize(4, samples=16, epochs=0), [{"samples": 0}, {"ranges": "x"}, {"rounding": "x"}]),
        (Quantize(4, samples=16, epochs=2), []),
        (Quantize(4, fold=False, per_channel=False, keep=BOTH), [{"keep": ["x"]}]),
    ],
    ids=lambda value: value.kind if isinstance(value, Phase) else "",
)  # fmt: skip
@pytest.mark.slow
def test_shipped_phases_keep_the_contract(phase: Phase, refused: list[dict[str, Any]]) -> None:
    check_phase(phase, refused=refused)


def test_a_model_and_data_of_ones_own() -> None:
    data = torch.randint(9, (24, 5)), torch.arange(24) % 3
    check_phase(Share(2, epochs=1), Sequences, data)
    check_phase(Quantize(8), Sequences, data)
    check_phase(Quantize(8, samples=10, epochs=0), Sequences, data)


class Sequences(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 6, batch_first=True)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc(self.lstm(self.embedding(x))[0][:, -1])
        return output


@dataclass
class Broken(Phase):
    kind: ClassVar[str] = "broken"

    how: str = ""
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=1), kw_only=True)

    @property
    def keeps(self) -> frozenset[str]:
        return frozenset({"zeros"} if self.how == "loses zeros" else ())

    def check_settings(self) -> None:
        if self.how == "crashes":
            raise ValueError("crash")

    def check_model(self, model: nn.Module) -> None:
        if self.how == "changes the model":
            model.fc2 = nn.Linear(12, 5)

    def enter(self, model: Any, world: Any) -> None:
        if self.how == "rank":
            with torch.no_grad():
                model.fc1.weight += world.rank
        if self.how in ("random", "forgets to fold"):
            torch.manual_seed(3 if self.how == "forgets to fold" else torch.seed())
            prune = Prune(0.5, schedule="cubic", epochs=1)
            prune.enter(model, world)
            for module in model.modules():
                if hasattr(module, "mask"):
                    module.mask.copy_(torch.rand_like(module.mask, dtype=torch.float) < 0.5)
            world.broadcast(model.buffers())

    def after_step(self, model: Any, world: Any, step: int, total: int) -> None:
        if self.how == "raises":
            raise RuntimeError("an unlucky step")

    def leave(self, model: Any) -> None:
        if self.how == "random":
            fold(model)
        if self.how == "adds a buffer":
            model.register_buffer("extra", torch.zeros(2))
        if self.how == "changes its function":
            model.fc1.forward = model.fc1.weight.new_zeros(1, 12).add
        if self.how == "diverges":
            model.fc1.weight.data.fill_(torch.inf)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("rank", r"different weights (conv|fc1|norm)\.\w+ after"),
        ("loses zeros", r"keeps says zeros, but zeros of conv\.weight are lost"),
        ("changes the model", "check_model or notices changed the model"),
        ("raises", "with 1 worker it raised RuntimeError: an unlucky step"),
        ("forgets to fold", "leave left a parametrization on conv"),
        ("adds a buffer", "leave left extra in the state_dict"),
        ("changes its function", "computes something else|raised"),
        ("diverges", "it raised Diverged"),
    ],
)
def test_a_broken_phase_is_found(how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=f"Broken: .*({message})"):
        check_phase(Broken(how))


def test_settings_that_are_not_refused_are_found() -> None:
    with pytest.raises(AssertionError, match=r"\{'how': 'well'\} is not refused"):
        check_phase(Broken(), refused=[{"how": "well"}])
    with pytest.raises(AssertionError, match="ValueError: crash; raise ConfigError"):
        check_phase(Broken(), refused=[{"how": "crashes"}])


@dataclass
class Unstored(Phase):
    """Chooses what it trains by something that a checkpoint does not store."""

    kind: ClassVar[str] = "unstored"

    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=2), kw_only=True)

    def after_step(self, model: nn.Module, world: Any, step: int, total: int) -> None:
        self.seen = getattr(self, "seen", 0) + 1
        with torch.no_grad():
            for places in weights(model).values():
                places[0].trainable.mul_(1 - 0.01 * self.seen)


def test_state_that_is_not_stored_is_found() -> None:
    with pytest.raises(AssertionError, match="resumed within it ends with a different"):
        check_phase(Unstored())


class NoDataclass(Train):
    strength: float = 1.0


def test_a_class_without_the_decorator_is_found() -> None:
    with pytest.raises(AssertionError, match="needs the decorator @dataclass"):
        check_phase(NoDataclass())


@dataclass
class Narrow(StructuralPhase):
    """Removes the last hidden unit of `ExampleNet`."""

    kind: ClassVar[str] = "narrow"

    how: str = ""
    fit: FitConfig = field(default_factory=lambda: FitConfig(epochs=1), kw_only=True)

    def check_settings(self) -> None:
        if self.how == "many":
            raise ConfigError("how=many")

    def plan_change(self, model: Any, world: Any) -> dict[str, Any]:
        if self.how == "at once":
            model.fc2.bias.data += 1
        size = 1 if self.how == "rank" and world.rank else 2
        return {"units": 0 if self.how == "nothing" else size, "how": self.how}

    @staticmethod
    def apply_change(model: Any, change: dict[str, Any]) -> None:
        kept = 12 - change["units"]
        if change["how"] == "values":
            kept -= int(model.norm.running_mean.any())
        new = nn.Linear(54, kept), nn.Linear(kept, 4)
        new[0].load_state_dict({n: t[:kept] for n, t in model.fc1.state_dict().items()})
        new[1].weight.data = model.fc2.weight.data[:, :kept].clone()
        new[1].bias.data = model.fc2.bias.data.clone()
        model.fc1, model.fc2 = new


def test_a_structural_phase_keeps_the_contract() -> None:
    check_structural_phase(Narrow(), ExampleNet, refused=[{"how": "many"}])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("rank", "with 2 workers it raised .*build the same model"),
        ("nothing", "apply_change leaves the structure as it is"),
        ("at once", "plan_change changes the model"),
        ("values", "cannot be loaded into a fresh model"),
    ],
)
def test_a_broken_structural_phase_is_found(how: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_structural_phase(Narrow(how))
