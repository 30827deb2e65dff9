"""The phase structured_prune: removed units, and the size of the model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer
from trainer.compress.counts import counts
from trainer.engine.cost import macs
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.phases import Prune, Quantize, Retrain, Share, StructuredPrune, Train
from trainer.testing import ExampleNet, check_structural_phase

WORLD = World.single(torch.device("cpu"))
X = torch.randn(8, 2, 6, 6)


def pruned(model: nn.Module, phase: StructuredPrune) -> nn.Module:
    phase.check_model(model)
    phase.check_inputs(model, X[:2])
    phase.observe(model, WORLD, [X])
    phase.apply_change(model, phase.plan_change(model, WORLD))
    phase.enter(model, WORLD)
    phase.leave(model)
    return model


@pytest.mark.parametrize(
    "phase",
    [StructuredPrune(0.5), StructuredPrune(0.6, "parameters", "layer", multiple=2, epochs=2)],
    ids=["macs", "parameters"],
)
def test_it_keeps_the_contract(phase: StructuredPrune) -> None:
    refused = [{"remaining": 1}, {"cost": "bytes"}, {"scope": "net"}, {"multiple": 0}]
    check_structural_phase(phase, refused=[*refused, {"min_kept": 2}])


def test_heads_keep_the_contract() -> None:
    data = torch.randn(24, 3, 8), torch.arange(24) % 3
    check_structural_phase(StructuredPrune(0.6, exempt=["fc"]), Attentive, data)


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc(self.attention(x, x, x)[0].mean(1))
        return output


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_it_removes_as_little_as_reaches_the_target(scope: str) -> None:
    torch.manual_seed(0)
    dense = ExampleNet()
    model = pruned(ExampleNet(), StructuredPrune(0.5, scope=scope))
    fraction = macs(model, X[:1]) / macs(dense, X[:1])
    assert 0.4 < fraction <= 0.5
    model = pruned(ExampleNet(), StructuredPrune(0.3, "parameters", scope))
    assert 0.2 < counts(model).parameters / counts(dense).parameters <= 0.3
    if scope == "layer":
        kept = len(model.conv.weight) / 6, len(model.fc1.weight) / 12  # type: ignore[attr-defined]
        assert kept[0] == pytest.approx(kept[1], abs=0.17)


def test_small_units_go_first_and_limits_hold() -> None:
    torch.manual_seed(0)
    model = ExampleNet()
    with torch.no_grad():
        for weight, dim in ((model.fc1.weight, 0), (model.fc2.weight, 1)):
            weight.index_fill_(dim, torch.tensor([1, 5, 7]), 1e-6)
    keeps = model.fc1.bias.detach()[[0, 2, 3, 4, 6, 8, 9, 10, 11]].clone()
    pruned(model, StructuredPrune(0.79, "parameters", exempt=["conv"]))
    assert torch.equal(model.fc1.bias, keeps)
    model = ExampleNet()
    pruned(model, StructuredPrune(0.7, min_kept=0.5, multiple=4))
    assert len(model.conv.weight) >= 4
    assert len(model.fc1.weight) % 4 == 0


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        (
            StructuredPrune(0.5, min_kept=1),
            "remaining=0.5: with min_kept=1 and .* 100.0% of the macs rem",
        ),
        (StructuredPrune(0.5, exempt=["*"]), "no weight is left"),
        (StructuredPrune(0.5, exempt=["fc1"]), "no channel of ExampleNet can be removed"),
        (StructuredPrune(0.5, exempt=["fc7"]), "'fc7' matches no weight"),
    ],
)
def test_what_cannot_be_done_is_refused(phase: StructuredPrune, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pruned(ExampleNet(), phase)


def test_latency_that_cannot_be_reached_ends_the_run() -> None:
    phase = StructuredPrune(0.001, "latency")
    phase.observe(model := ExampleNet(), WORLD, [X])
    with pytest.raises(trainer.RunError, match=r"remaining=0\.001: .* of the latency remain"):
        phase.plan_change(model, WORLD)


def test_phases_look_at_models_with_several_inputs(tmp_path: Any) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": self.out(self.fc(a + b).relu())}

    data = {"a": torch.randn(16, 4), "b": torch.randn(16, 4)}, torch.arange(16) % 3
    result = trainer.run(
        model=Sum,
        data=(data, data, data),
        phases=[Train(epochs=1), StructuredPrune(0.5), Quantize(samples=8, epochs=0)],
        cluster={"backend": "inline", "workers": 1},
        out=tmp_path / "run",
        progress=False,
    )
    assert result.model.fc.out_features == 4
    assert result.model.out.input_quantizer.ready


def test_the_rest_of_the_chain_follows_it_and_the_file_gives_the_model(tmp_path: Any) -> None:
    data = X.repeat(3, 1, 1, 1), torch.arange(24) % 4
    phases = [
        Train(epochs=1),
        StructuredPrune(0.5),
        Retrain(epochs=1),
        Prune(0.5),
        Share(3, epochs=1),
        Quantize(8, keep=["zeros", "sharing"], per_channel=False, fold=False, epochs=1),
    ]
    result = trainer.run(
        model=ExampleNet(),
        data=(data, data, data),
        phases=phases,
        artifact={"make": True, "coder": "ans"},
        cluster={"backend": "inline", "workers": 1},
        batch_size=8,
        out=tmp_path / "run",
        progress=False,
    )
    loaded = trainer.load(tmp_path / "run/model.dcz", ExampleNet())
    assert torch.equal(loaded(X), result.model(X))
    summary = result.summary["artifact"]
    names = [stage["name"] for stage in summary["stages"]]
    assert names[:5] == ["dense", "C", "C+P", "C+P+S", "C+P+S+Q"]
    assert summary["dense_bytes"] == 4 * counts(ExampleNet()).parameters
    assert result.summary["phases"][1]["macs"] <= result.summary["phases"][0]["macs"] / 2
