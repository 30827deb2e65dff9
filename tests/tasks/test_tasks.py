"""Tasks against the formulas of PyTorch: losses, units, metrics, outputs, and what is refused."""

import contextlib
import copy
import re
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.errors import ConfigError
from trainer.metrics import format_metric
from trainer.tasks import (
    Average,
    Classification,
    Custom,
    LanguageModel,
    MultiLabel,
    Regression,
    Segmentation,
    Task,
    TorchMetric,
)
from trainer.tasks.output import auxiliary, prediction

torch.manual_seed(0)
LOGITS = torch.randn(6, 4)
CLASSES = torch.tensor([0, 1, 2, 3, -100, 1])
PIXELS = torch.randn(2, 3, 4, 5), torch.randint(3, (2, 4, 5))
TOKENS = torch.randn(2, 5, 7), torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 0, 1]])
NUMBERS = torch.randn(6, 1), torch.randn(6)
LABELS = torch.randn(5, 3), torch.randint(2, (5, 3)).float()
PIXELS[1][0, 0] = -100
WEIGHTS = [1.0, 2.0, 0.5, 3.0]

CASES = [
    (Classification(), LOGITS, CLASSES, F.cross_entropy(LOGITS, CLASSES), 5),
    (
        Classification(class_weights=WEIGHTS, label_smoothing=0.1),
        LOGITS,
        CLASSES,
        F.cross_entropy(LOGITS, CLASSES, torch.tensor(WEIGHTS), label_smoothing=0.1),
        8.5,
    ),
    (Segmentation(), *PIXELS, F.cross_entropy(*PIXELS), 35),
    (LanguageModel(), *TOKENS, F.cross_entropy(TOKENS[0].flatten(0, 1), TOKENS[1].flatten()), 8),
    (
        LanguageModel(shift=True),
        *TOKENS,
        F.cross_entropy(TOKENS[0][:, :-1].flatten(0, 1), TOKENS[1][:, 1:].flatten()),
        6,
    ),
    (Regression(), *NUMBERS, F.mse_loss(NUMBERS[0][:, 0], NUMBERS[1]), 6),
    (Regression("mae"), *NUMBERS, F.l1_loss(NUMBERS[0][:, 0], NUMBERS[1]), 6),
    (
        Regression("huber", delta=0.5),
        *NUMBERS,
        F.huber_loss(NUMBERS[0][:, 0], NUMBERS[1], delta=0.5),
        6,
    ),
    (Regression(nn.SmoothL1Loss()), *NUMBERS, F.smooth_l1_loss(NUMBERS[0][:, 0], NUMBERS[1]), 6),
    (MultiLabel(), *LABELS, F.binary_cross_entropy_with_logits(*LABELS), 15),
    (
        MultiLabel(positive_weights=[2.0, 1.0, 3.0]),
        *LABELS,
        F.binary_cross_entropy_with_logits(*LABELS, pos_weight=torch.tensor([2.0, 1.0, 3.0])),
        15,
    ),
    (Custom(F.mse_loss), *LABELS, F.mse_loss(*LABELS), 5),
    (Custom(nn.L1Loss(reduction="none"), count="targets"), *LABELS, F.l1_loss(*LABELS), 15),
]


@pytest.mark.parametrize(("task", "output", "targets", "expected", "units"), CASES)
def test_losses_are_those_of_torch(
    task: Task, output: Tensor, targets: Tensor, expected: Tensor, units: float
) -> None:
    assert task.units(targets) == units
    torch.testing.assert_close(task.training_loss(output, targets, units), expected)
    torch.testing.assert_close(task.evaluation_loss(output, targets, units), expected * units)
    assert task.check(output[:1], targets[:1]) is None
    assert task.check_type(targets) is None
    assert task.check_values(targets, output[:1].shape) is None


@pytest.mark.parametrize(("task", "output", "targets", "expected", "units"), CASES)
def test_parts_weighted_by_their_units_are_the_whole(
    task: Task, output: Tensor, targets: Tensor, expected: Tensor, units: float
) -> None:
    parts = [(output[:1], targets[:1]), (output[1:], targets[1:])]
    counts = [task.units(part) for _, part in parts]
    assert sum(counts) == units
    found = sum(
        task.training_loss(*part, count) * count for part, count in zip(parts, counts, strict=True)
    )
    torch.testing.assert_close(found / units, expected)


@pytest.mark.parametrize(("task", "output", "targets", "expected", "units"), CASES)
def test_batches_without_counted_targets_have_no_loss(
    task: Task, output: Tensor, targets: Tensor, expected: Tensor, units: float
) -> None:
    if isinstance(task, Classification):
        output = output.clone().requires_grad_()
        task.training_loss(output, torch.full_like(targets, -100), 0).backward()
        assert output.grad is not None
        assert output.grad.eq(0).all()


def measured(task: Task, *batches: tuple[Tensor, Tensor]) -> dict[str, float]:
    """The metrics of a task if each batch is on another worker, and one worker has none."""
    workers = []
    for metric in task.measured.values():
        row = [metric.start() for _ in range(len(batches) + 1)]
        for accumulator, (output, targets) in zip(row, batches, strict=False):
            accumulator.add(*task.metric_inputs(output, targets))
        workers.append(row)
    return {
        name: row[0].value(_gather(row)) for name, row in zip(task.measured, workers, strict=True)
    }


def _gather(accumulators: list[Any]) -> Any:
    """A gather for the first of several accumulators: it asks the others for the same state."""
    calls = []

    def gather(own: Tensor) -> list[Tensor]:
        position = len(calls)
        calls.append(own)
        others = []
        for accumulator in accumulators[1:]:
            states: list[Tensor] = []

            def record(state: Tensor, states: list[Tensor] = states) -> list[Tensor]:
                states.append(state)
                return [state]

            with contextlib.suppress(Exception):  # a worker without samples has no value alone
                copy.deepcopy(accumulator).value(record)
            state = states[position]
            others.append(state if state.numel() else state.to(own.dtype))
        return [own, *others]

    return gather


def test_metrics_do_not_depend_on_the_parts() -> None:
    cases = [
        (
            Classification(metrics=["accuracy", "top5_accuracy", "f1", "perplexity"]),
            LOGITS,
            CLASSES,
        ),
        (Segmentation(metrics=["miou", "accuracy"]), *PIXELS),
        (Regression(metrics=["mae", "mse", "rmse", "r2"]), *NUMBERS),
        (MultiLabel(metrics=["f1", "macro_f1", "label_accuracy", "exact_accuracy"]), *LABELS),
    ]
    for task, output, targets in cases:
        whole = {name: metric.start() for name, metric in task.measured.items()}
        for accumulator in whole.values():
            accumulator.add(*task.metric_inputs(output, targets))
        expected = {name: each.value(lambda own: [own]) for name, each in whole.items()}
        uneven = (output[:1], targets[:1]), (output[1:], targets[1:])
        assert measured(task, *uneven) == pytest.approx(expected, rel=1e-12), type(task)


def test_values_of_metrics() -> None:
    found = measured(Regression(metrics=["mae", "rmse", "r2"]), NUMBERS)
    error = NUMBERS[0][:, 0] - NUMBERS[1]
    assert found["mae"] == pytest.approx(error.abs().mean().item())
    assert found["rmse"] == pytest.approx(error.square().mean().sqrt().item())
    rest = error.square().sum() / (NUMBERS[1] - NUMBERS[1].mean()).square().sum()
    assert found["r2"] == pytest.approx(1 - rest.item(), rel=1e-5)

    logits = torch.eye(3)[torch.tensor([0, 0, 1, 2])]
    classes = torch.tensor([0, 1, 1, 1])
    found = measured(Classification(metrics=["accuracy", "f1"]), (logits, classes))
    assert found == {"accuracy": 0.5, "f1": pytest.approx((2 / 3 + 1 / 2 + 0) / 3)}
    images = logits.T[None], classes[None]  # [1, classes, 4]
    found = measured(Segmentation(metrics=["miou"]), images)
    assert found == {"miou": pytest.approx((1 / 2 + 1 / 3 + 0) / 3)}

    labels = torch.tensor([[1.0, 0], [1, 1]]), torch.tensor([[1.0, 0], [0, 1]])
    found = measured(
        MultiLabel(metrics=["f1", "label_accuracy", "exact_accuracy"]),
        (labels[0] * 2 - 1, labels[1]),
    )
    assert found == {"f1": 0.8, "label_accuracy": 0.75, "exact_accuracy": 0.5}

    perplexity = measured(LanguageModel(), TOKENS)["perplexity"]
    loss = F.cross_entropy(TOKENS[0].flatten(0, 1), TOKENS[1].flatten())
    assert perplexity == pytest.approx(loss.exp().item(), rel=1e-6)


def test_own_metrics() -> None:
    worst = Average(lambda p, t: (p - t).abs().amax(1), "minimize")
    task = MultiLabel(metrics={"worst": worst, "f1": None})
    assert task.first_metric == "worst"
    assert task.directions == {"worst": "minimize", "f1": "maximize"}
    half = [(LABELS[0][:2], LABELS[1][:2]), (LABELS[0][2:], LABELS[1][2:])]
    expected = (LABELS[0].sigmoid() - LABELS[1]).abs().amax(1).mean().item()
    assert measured(task, *half)["worst"] == pytest.approx(expected)
    each = Regression(metrics={"distance": Average(lambda p, t: (p - t).abs())})
    expected = (LABELS[0] - LABELS[1]).abs().mean().item()
    assert measured(each, *half)["distance"] == pytest.approx(expected)
    keeps_a_dimension = Average(lambda p, t: (p - t).mean().reshape(1))
    with pytest.raises(ValueError, match=r"returned \[1\] for 5 targets"):
        keeps_a_dimension.statistics(*LABELS)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_metrics_of_torchmetrics_are_those_of_the_whole_set() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    objects = {
        "auroc": torchmetrics.AUROC(task="multiclass", num_classes=4),
        "f1_score": torchmetrics.F1Score(task="multiclass", num_classes=4, average="macro"),
    }
    task = Classification(metrics=objects)
    assert task.directions == {"auroc": "maximize", "f1_score": "maximize"}
    logits, classes = torch.randn(40, 4), torch.randint(4, (40,))
    parts = [(logits[:7], classes[:7]), (logits[7:], classes[7:])]
    expected = {name: each(logits, classes).item() for name, each in objects.items()}
    assert measured(task, *parts) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError, match="does not state whether higher is better"):
        Classification(metrics={"mean": torchmetrics.MeanMetric()})
    chosen = TorchMetric(torchmetrics.MeanMetric(), direction="minimize")
    assert Classification(metrics={"mean": chosen}).directions == {"mean": "minimize"}


def test_distillation_has_its_minimum_at_the_teacher() -> None:
    for task, output, targets, _, units in CASES:
        if not task.can_distill or task.has_own_loss:
            continue
        student = output.clone().requires_grad_()
        found = task.divergence(student, output, targets, units, 2.0)
        found.backward()
        assert found.item() == pytest.approx(0, abs=1e-6), type(task)
        assert student.grad is not None
        assert student.grad.abs().max() < 1e-6
        assert task.divergence(0 * output, output, targets, units, 2.0) > 0
    assert not Custom(F.mse_loss).can_distill


Inception = namedtuple("Inception", ["logits", "aux_logits"])


@pytest.mark.parametrize(
    ("output", "wanted"),
    [
        (LOGITS, None),
        ((LOGITS, torch.zeros(3)), None),
        (Inception(LOGITS, -LOGITS), None),
        ({"hidden": torch.zeros(1), "logits": LOGITS}, None),
        (OrderedDict(out=LOGITS, aux=-LOGITS), None),
        (SimpleNamespace(loss=torch.zeros(()), logits=LOGITS), None),
        ((torch.zeros(1), LOGITS), 1),
        ({"boxes": LOGITS}, "boxes"),
        (SimpleNamespace(scores=LOGITS), "scores"),
    ],
)
def test_predictions_in_outputs(output: Any, wanted: Any) -> None:
    assert prediction(output, wanted) is LOGITS


def test_outputs_without_a_prediction() -> None:
    with pytest.raises(ValueError, match=r"dict \(features\); set task.output to the name"):
        prediction({"features": LOGITS})
    with pytest.raises(ValueError, match="tuple with 3 being a NoneType"):
        prediction((LOGITS,), 3)


def test_auxiliary_heads_count_in_training_only() -> None:
    output = Inception(LOGITS, -LOGITS)
    assert [head.data_ptr() for head in auxiliary({"out": LOGITS, "aux": LOGITS})]
    own, other = F.cross_entropy(LOGITS, CLASSES), F.cross_entropy(-LOGITS, CLASSES)
    task = Classification(auxiliary=0.4)
    torch.testing.assert_close(task.training_loss(output, CLASSES, 5), own + 0.4 * other)
    torch.testing.assert_close(task.evaluation_loss(output, CLASSES, 5), 5 * own)


class Recorder(nn.Module):
    def forward(self, *args: Any, **named: Any) -> Any:
        return {"args": args, "named": named, "loss": torch.tensor(2.0)}


def test_batches_become_calls() -> None:
    task, a, b = Classification(), torch.zeros(1), torch.ones(1)
    assert task.call(Recorder(), a)["args"] == (a,)
    assert task.call(Recorder(), (a, b))["args"] == (a, b)
    assert task.call(Recorder(), {"ids": a, "attention_mask": b})["named"] == {
        "ids": a,
        "attention_mask": b,
    }
    own = Custom("model", target_argument="labels")
    output = own.call_with_targets(Recorder(), {"ids": a}, b)
    assert output["named"] == {"ids": a, "labels": b}
    assert own.call_with_targets(Recorder(), a, b)["args"] == (a,)
    assert own.training_loss(output, b, 1) == 2
    assert own.evaluation_loss(output, b, 3) == 6
    with pytest.raises(
        ValueError, match=r"in training and in evaluation; .*target_argument is set"
    ):
        own.training_loss(LOGITS, b, 1)
    with pytest.raises(ValueError, match=r"a loss \[2\]; it must be the mean"):
        own.training_loss({"loss": torch.ones(2)}, b, 1)


def test_a_model_that_computes_its_loss_needs_a_prediction_for_metrics_alone() -> None:
    output = {"loss": torch.tensor(2.0)}
    task = Custom("model")
    assert not task.needs_prediction
    assert task.evaluation_loss(output, LOGITS, 6) == 12
    assert Custom("model").prediction({**output, "logits": LOGITS}) is LOGITS
    with pytest.raises(ValueError, match=r"dict \(boxes\) without a loss, which must be in it in"):
        task.evaluation_loss({"boxes": LOGITS}, LOGITS, 6)
    with pytest.raises(ValueError, match=r"dict \(loss\); set task.output"):  # as for ONNX
        task.prediction(output)
    assert Custom("model", metrics={"mean": Average(F.mse_loss)}).needs_prediction
    with pytest.raises(
        ValueError, match=r"set task.output .*; a loss of several .*task.loss=model"
    ):
        Custom(F.mse_loss).prediction({"start": LOGITS, "end": LOGITS})


def test_losses_of_another_number_than_the_units_are_refused() -> None:
    prediction, targets = torch.zeros(6, 2), torch.ones(6, 2)
    each = nn.MSELoss(reduction="none")
    assert Custom(each, count="targets").mean_loss(prediction, targets, 12) == 1
    assert Custom(lambda p, t: each(p, t).sum(1)).mean_loss(prediction, targets, 6) == 2
    # The partners of mixed samples: one more target is ignored than among the samples themselves.
    own = Classification(nn.CrossEntropyLoss(reduction="none"))
    expected = F.cross_entropy(LOGITS, CLASSES, reduction="sum") / 6
    torch.testing.assert_close(own.mean_loss(LOGITS, CLASSES, 6), expected)
    for loss, shape in ((each, r"\[6, 2\]"), (lambda p, t: F.mse_loss(p, t)[None], r"\[1\]")):
        with pytest.raises(ValueError, match=rf"returned {shape} .* for each unit: 6"):
            Custom(loss).mean_loss(prediction, targets, 6)
    with pytest.raises(ValueError, match=r"returned \[6\] .* for each unit: 12"):
        Regression(lambda p, t: each(p, t).sum(1)).mean_loss(prediction, targets, 12)


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (Classification, {"label_smoothing": 1.0}, "label_smoothing=1.0: it must be in"),
        (Classification, {"class_weights": [1, -1]}, "class_weights: they must be a list of num"),
        (Classification, {"class_weights": "many"}, "class_weights: they must be numbers"),
        (Classification, {"metrics": "accuracy"}, "metrics=accuracy: it must be a list of names"),
        (
            Classification,
            {"metrics": ["miou"]},
            "there is no miou; built-in ones .*: accuracy",
        ),
        (Classification, {"metrics": ["loss"]}, "'loss' cannot be the name of a metric"),
        (
            Classification,
            {"metrics": {"own": 3}},
            "metrics.own: a int is not a metric of",
        ),
        (Classification, {"loss": "mse"}, "loss=mse: it must be null"),
        (Classification, {"auxiliary": -1.0}, "auxiliary=-1.0"),
        (
            Classification,
            {"loss": F.cross_entropy, "label_smoothing": 0.1},
            "build them into your own loss",
        ),
        (Regression, {"loss": "mde"}, "loss=mde: it must be one of mse, mae, huber"),
        (Regression, {"delta": 0.0}, "delta=0.0: it must be above 0"),
        (
            Regression,
            {"loss": nn.MSELoss(reduction="sum")},
            "reduction=sum; it must be mean or",
        ),
        (MultiLabel, {"positive_weights": [0.0]}, "positive_weights: they must be above 0"),
        (Custom, {}, "loss=None: it must be a mapping with the _target_ of a loss"),
        (Custom, {"loss": F.mse_loss, "count": "tokens"}, "count=tokens: it must be one of"),
        (Custom, {"loss": nn.CrossEntropyLoss(torch.ones(3))}, "Classification with class_weights"),
        (Custom, {"loss": nn.PReLU()}, "PReLU has trainable parameters"),
    ],
)
def test_wrong_settings(kind: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kind(**settings)


@pytest.mark.parametrize(
    ("task", "output", "targets", "said"),
    [
        (Segmentation(), (1, 3, 4, 4), (1, 8, 8), "height and width must be those of the target"),
        (Segmentation(), (1, 4, 4), (1, 4, 4), r"logits \[samples, classes, ...\], such as NCHW"),
        (Regression(), (1, 2), (1, 3), "same shape"),
        (Regression(), (1, 2), (1,), "same shape"),
        (MultiLabel(), (1, 2), (1, 3), "one for each label"),
        (Classification(class_weights=[1.0, 1.0]), (1, 3), (1,), "has 2 weights for 3 classes"),
        (LanguageModel(shift=True), (1, 1, 3), (1, 1), "at least two tokens"),
    ],
)
def test_wrong_shapes(task: Task, output: Any, targets: Any, said: str) -> None:
    found = task.check(torch.zeros(output), torch.zeros(targets, dtype=torch.int64))
    assert found is not None
    assert re.search(said, found)


def test_wrong_values() -> None:
    assert Regression().check_values(torch.tensor([0.0, float("nan")]), (1, 1)) == (
        1,
        "its target is NaN or infinite; correct or remove it",
    )
    position, reason = MultiLabel().check_values(torch.tensor([[0, 1], [2, 0]]), (1, 2)) or (0, "")
    assert position == 1
    assert "holds 2; labels are 0 (absent) or 1" in reason
    position, reason = Classification().check_values(torch.tensor([1.0, 0.5]), (1, 3)) or (0, "")
    assert (position, reason) == (1, "its target must be an integer class, not float32")
    assert "int64" in (Classification().check_type(torch.zeros(1)) or "")
    _, reason = Classification().check_values(torch.tensor([0, 1]), (1, 1)) or (0, "")
    assert "one output; task=multilabel" in reason
    _, reason = Classification().check_values(torch.tensor([0, 2]), (1, 1)) or (0, "")
    assert "its target is 2, but the model has 1 output, for targets from 0 to 0" in reason
    found = Segmentation(ignore_index=255).check_values(torch.tensor([[0, 255], [3, 0]]), (1, 3, 2))
    assert found is not None
    assert found[0] == 1


def test_metrics_are_written_as_usual() -> None:
    assert format_metric("top5_accuracy", 0.98765) == "98.77%"
    assert format_metric("mae", 0.0123456) == "0.01235"
    assert format_metric("mse", 123456.7) == "123,457"


def test_a_function_is_no_metric():
    with pytest.raises(
        ConfigError, match=r"it lacks update; .* trainer\.tasks\.Average\(function, "
    ):
        TorchMetric(max)


@dataclass
class Parts:
    """What a variational autoencoder returns."""

    image: Tensor
    mean: Tensor


@dataclass(slots=True, frozen=True)
class SlottedParts:
    image: Tensor


def loss_of_parts(output: Any, targets: Tensor) -> Tensor:
    image, mean = output.values() if isinstance(output, dict) else output
    return F.mse_loss(image, targets) + mean.square().mean()


def test_a_loss_may_take_all_that_the_model_returns() -> None:
    image, targets = NUMBERS[0][:, 0], NUMBERS[1]
    expected = F.mse_loss(image, targets) + image.square().mean()
    task = Custom(loss_of_parts, whole_output=True)
    assert not task.needs_prediction
    for output in ((image, image), {"image": image, "mean": image}):
        torch.testing.assert_close(task.training_loss(output, targets, 6), expected)
        torch.testing.assert_close(task.evaluation_loss(output, targets, 6), 6 * expected)
    each = Custom(lambda output, targets: (output.image - targets) ** 2, whole_output=True)
    found = each.training_loss(Parts(image, image), targets, 6)
    torch.testing.assert_close(found, F.mse_loss(image, targets))


def test_a_loss_of_the_whole_output_is_evaluated_in_fp32() -> None:
    seen = []

    def record(output: Any, targets: Tensor) -> Tensor:
        seen.append(output)
        return targets.sum()

    half = torch.ones(2, dtype=torch.bfloat16)
    named = namedtuple("named", "image")
    parts = Parts(half, torch.ones(2).long())
    outputs = [half, (half,), {"image": half}, named(half), parts, SlottedParts(half)]
    for output in outputs:
        Custom(record, whole_output=True).evaluation_loss(output, NUMBERS[1], 6)
    found = [seen[0], seen[1][0], seen[2]["image"], *(one.image for one in seen[3:])]
    assert [value.dtype for value in found] == [torch.float32] * 6
    assert seen[4].mean.dtype == torch.int64
    assert outputs[4].image.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("wrap", "whole"),
    [
        (lambda values: {"image": values}, True),
        (SlottedParts, True),
        (lambda values: values, False),
    ],
)
def test_without_units_the_loss_has_no_gradient(wrap: Any, whole: bool) -> None:
    values = torch.tensor([1.0, -torch.inf, torch.nan], requires_grad=True)
    ignored = torch.full((3,), -100)
    task = Custom(loss_of_parts, count="targets", whole_output=whole)
    loss = task.training_loss(wrap(values), ignored, task.units(ignored))
    loss.backward()
    assert loss == 0
    assert values.grad is not None
    assert values.grad.eq(0).all()


def test_a_loss_that_the_model_computes_is_called_with_nothing() -> None:
    with pytest.raises(ConfigError, match=r"^whole_output=true with loss=model: .*; leave whole"):
        Custom("model", whole_output=True)
