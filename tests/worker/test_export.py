"""Export to ONNX: tried with the fresh model before training, compared at the end."""

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trainer.data
import trainer.worker.export
from tests.exporter import exporter_reads_its_operators_once  # noqa: F401 - a fixture
from tests.test_resume import config
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.experiment import Experiment
from trainer.phases import Quantize
from trainer.store.serialization import to_bytes
from trainer.tasks import Classification
from trainer.worker.export import export_models, try_export

WORLD = World.single(torch.device("cpu"))


def second() -> World:
    return World(1, 2, torch.device("cpu"), WORLD.transport, None)


class Odd(nn.Module):
    """Its logits depend on a decision that no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.flatten(1))
        return logits if logits.sum() > 0 else -logits


class ByKeyword(nn.Linear):
    """It accepts its input by name only."""

    def __init__(self) -> None:
        super().__init__(784, 10)

    def forward(self, *, images: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(images.flatten(1))


class Named(Classification):
    def call(self, model: nn.Module, inputs: Any) -> Any:
        return model(images=inputs)


def chosen(**model: Any) -> Experiment:
    settings = model or {"_target_": "trainer.models.LeNet300"}
    quantize = {"_target_": "trainer.phases.Quantize", "fit": {"epochs": 1}}
    return config(model=settings, phases={"quantize": quantize})


@pytest.mark.slow
def test_the_trial_calls_the_model_as_the_task_does() -> None:
    experiment = config(
        model={"_target_": f"{__name__}.ByKeyword"},
        task={"_target_": f"{__name__}.Named"},
        phases={"quantize": {"_target_": "trainer.phases.Quantize", "fit": {"epochs": 1}}},
    )
    assert list(try_export(WORLD, experiment)) == []


@pytest.mark.slow
def test_a_model_that_cannot_be_exported_is_refused_before_anything_is_trained() -> None:
    said = r"export.onnx=true: Odd cannot be exported to ONNX: .*; set export.onnx=false"
    with pytest.raises(ConfigError, match=said):
        list(try_export(WORLD, chosen(_target_=f"{__name__}.Odd")))
    assert list(try_export(WORLD, chosen())) == []


def test_errors_of_the_run_are_reported_in_the_same_words() -> None:
    with pytest.raises(ConfigError, match=r"data: train sample 0: its target is 9, .* 9 outputs"):
        list(try_export(WORLD, chosen(_target_="trainer.models.LeNet300", classes=9)))


def test_a_structure_that_cannot_be_reached_is_refused_with_the_name_of_its_phase() -> None:
    target = {"_target_": "trainer.phases.StructuredPrune", "remaining": 0.5, "min_kept": 1}
    model = {"_target_": "trainer.models.LeNet300"}
    with pytest.raises(ConfigError, match=r"phases\.small: remaining=0\.5: .* raise remaining"):
        list(try_export(WORLD, config(model=model, phases={"small": target})))


def test_only_the_rank_that_exports_needs_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert list(try_export(second(), chosen())) == []
    with pytest.raises(ConfigError, match="onnxruntime cannot be imported"):
        list(try_export(WORLD, chosen()))


@pytest.mark.slow
def test_the_final_model_is_compared_with_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = []

    def watched(function: Any) -> Any:
        def wrapper(*args: Any) -> Any:
            busy.append(WORLD.heartbeat.is_busy)
            return function(*args)

        return wrapper

    for name in ("to_onnx", "latencies"):
        monkeypatch.setattr(
            f"trainer.worker.export.{name}", watched(getattr(trainer.worker.export, name))
        )
    cfg = chosen()
    torch.manual_seed(0)
    model = cfg.build_model()
    dense = to_bytes(model.state_dict())
    phase = cfg.phases["quantize"]
    assert isinstance(phase, Quantize)
    phase.enter(model, WORLD)
    model.train()(torch.rand(8, 1, 28, 28))
    phase.after_step(model, WORLD, 1, 1)
    phase.leave(model)
    final = to_bytes(model.state_dict())
    assert list(export_models(second(), cfg, final, dense)) == []
    told = list(export_models(WORLD, cfg, final, dense))
    assert busy  # however long a large model takes, it is no hang
    assert all(busy)
    assert [one.name for one in told] == ["fp32", "int8"]
    assert told[0].content == b""
    assert len(told[1].content) == told[1].file_bytes < 0.35 * told[0].file_bytes
    assert all(abs(one.accuracy - one.torch_metrics["accuracy"]) <= 0.05 for one in told)
    assert told[0].difference < 1e-4


class Pairs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)

    def forward(self, nodes: Tensor, counts: Tensor) -> Tensor:
        logits: Tensor = self.fc(nodes).unflatten(0, (len(counts), 2)).sum(1)
        return logits


def _pairs(samples: Any) -> Any:
    nodes = torch.zeros(2 * len(samples), 2)
    return (nodes, torch.zeros(len(samples))), torch.tensor([target for _, target in samples])


def test_inputs_without_rows_are_refused() -> None:
    samples = [(torch.zeros(2), 1)] * 20
    data = trainer.data.dataset(samples, collate=_pairs)  # type: ignore[arg-type]
    given = Experiment(model=Pairs, data=data, phases=[Quantize(epochs=1)])
    with pytest.raises(ConfigError, match=r"^export.onnx=true: .* no row for each sample"):
        list(try_export(WORLD, given))
