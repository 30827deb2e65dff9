"""Losses and metrics of every task do not depend on workers, micro-batches and padding."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.engine.bodies import runtime
from trainer.config import FitConfig
from trainer.data.split import TensorSplit
from trainer.engine.evaluate import Metrics, evaluate
from trainer.engine.loop import fit
from trainer.engine.objective import Distilled
from trainer.engine.world import World
from trainer.tasks import (
    Classification,
    Custom,
    LanguageModel,
    MultiLabel,
    Regression,
    Segmentation,
    Task,
)

N = 19  # samples; the last batch is a small one


class Pair(nn.Module):
    """Two inputs, by keyword; the output is a mapping."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.head = nn.Linear(8, outputs)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(torch.cat([left, right], -1))}


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.conv(images)
        return features, features.mean()


def problem(kind: str) -> tuple[Task, nn.Module, TensorSplit]:
    """A task, a model, and data."""
    torch.manual_seed(0)
    pair = {"left": torch.randn(N, 5, 4), "right": torch.randn(N, 5, 4)}
    tokens = torch.randint(6, (N, 5))
    for sample in range(N):
        tokens[sample, 1 + sample % 5 :] = -100  # padding of different lengths
    flat = {name: value[:, 0] for name, value in pair.items()}
    match kind:
        case "weighted":
            task: Task = Classification(class_weights=[1.0, 0.2, 3.0], metrics=["f1", "accuracy"])
            return task, Pair(3), TensorSplit(flat, torch.randint(3, (N,)))
        case "language":
            return LanguageModel(), Pair(6), TensorSplit(pair, tokens)
        case "segmentation":
            pixels = torch.randint(3, (N, 4, 4))
            pixels[:, 0] = 255
            task = Segmentation(ignore_index=255)
            return task, Images(), TensorSplit(torch.randn(N, 2, 4, 4), pixels)
        case "regression":
            return Regression("huber"), Pair(1), TensorSplit(flat, torch.randn(N))
        case "multilabel":
            labels = torch.randint(2, (N, 3)).float()
            return MultiLabel(label_smoothing=0.1), Pair(3), TensorSplit(flat, labels)
        case "custom":
            own = Custom(lambda prediction, targets: (prediction - targets).abs().mean())
            return own, Pair(3), TensorSplit(flat, torch.randn(N, 3))
    raise AssertionError(kind)


def train(
    world: World, task: Task, model: nn.Module, split: TensorSplit, accumulate: int
) -> tuple[list[Tensor], Metrics, list[float]]:
    task, model, teacher = (copy.deepcopy(each) for each in (task, model, model))
    for parameter in teacher.parameters():
        parameter.data *= 1.5
    shared = runtime(world, batch_size=8, task=task)
    objective = Distilled(task, teacher, 0.3, 2.0) if task.can_distill else None
    cfg = FitConfig(epochs=2, accumulate=accumulate)
    losses = [step.loss for step in fit(model, split, cfg, shared, objective=objective)]
    return [p.detach() for p in model.parameters()], evaluate(model, split, shared), losses


@pytest.mark.parametrize(
    "kind", ["weighted", "language", "segmentation", "regression", "multilabel", "custom"]
)
def test_workers_and_micro_batches_train_like_one(
    ranks: Callable[..., list[Any]], kind: str
) -> None:
    given = problem(kind)
    weights, metrics, losses = train(World.single(torch.device("cpu")), *given, 1)
    assert not torch.equal(next(given[1].parameters()), weights[0])
    for found, measured, seen in ranks(3, lambda world: train(world, *given, 2)):
        for one, other in zip(found, weights, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert seen == pytest.approx(losses, rel=1e-5)
        assert measured.loss == pytest.approx(metrics.loss, rel=1e-5)
        assert measured.values == pytest.approx(metrics.values, rel=1e-4)


def test_metrics_of_more_workers_than_samples(ranks: Callable[..., list[Any]]) -> None:
    task, model, split = problem("regression")
    few = TensorSplit({name: value[:2] for name, value in split.inputs.items()}, split.targets[:2])

    def body(world: World) -> Metrics:
        return evaluate(model, few, runtime(world, batch_size=8, task=task))

    alone = body(World.single(torch.device("cpu")))
    for found in ranks(3, body):
        assert found.values == pytest.approx(alone.values)
    assert alone.direction == "minimize"
    assert (alone.name, alone.first) == ("mae", alone.values["mae"])
    assert alone.accuracy is None
