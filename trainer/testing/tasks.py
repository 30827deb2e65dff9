"""The contract of a task (trainer.tasks.Task): losses and metrics of parts add up to the whole."""

import contextlib
import copy
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn

from trainer.data.tree import map_tensors
from trainer.tasks import Task

_TOLERANCE = 1e-4  # relative; sums in float32 in another order


def check_task(task: Task, model: nn.Module, inputs: Any, targets: Tensor) -> None:
    """Check a task on one batch.

    The loss of the batch must be the mean of those of its parts, weighted by their units, and
    metrics must be the same for one worker and for several with uneven parts. Otherwise the result
    of a run would depend on the number of workers.

    Args:
        task: An object of your class.
        model: A model; it is used in evaluation mode and not changed.
        inputs: Of at least 4 samples, as a split yields them: a tensor, or a tuple or mapping.
        targets: Of these samples [n, ...].

    Raises:
        AssertionError: The contract is violated; the message describes how.
    """
    name = type(task).__name__
    count = len(targets)
    assert count >= 4, f"pass at least 4 samples, not {count}"
    task = cloudpickle.loads(cloudpickle.dumps(task))  # as it travels to the workers
    task = copy.deepcopy(task)
    model = copy.deepcopy(model).eval()
    parts = [torch.arange(0, 1), torch.arange(1, count)]

    assert task.check_type(targets) is None, f"{name}.check_type refuses the targets"
    output = task.call_with_targets(model, inputs, targets)
    if task.needs_prediction:
        prediction = task.prediction(output)
        found_type = type(prediction).__name__
        assert isinstance(prediction, Tensor), f"{name}.prediction returns {found_type}"
        refused = task.check(prediction[:1], targets[:1])
        assert refused is None, f"{name}.check refuses the first sample: {refused}"
        refused_values = task.check_values(targets, prediction[:1].shape)
        assert refused_values is None, f"{name}.check_values refuses a target: {refused_values}"

    units = [task.units(targets[part]) for part in parts]
    whole = task.units(targets)
    assert whole > 0, f"{name}.units: nothing in the batch counts"
    _check_equal(f"{name}.units of the parts {units}, added", sum(units), whole)
    full = task.full_units(targets[:1])
    assert full >= 1, f"{name}.full_units of a sample is {full}; it must be at least 1"
    if not task.fractional_units:
        full = task.full_units(targets)
        assert full >= whole, f"{name}.full_units is {full}, less than {name}.units: {whole}"
        assert whole == int(whole), f"{name}.units is {whole}: define fractional_units as well"

    def losses(indices: Tensor) -> tuple[Tensor, float]:
        own = targets[indices]
        few = map_tensors(lambda tensor: tensor[indices], inputs)
        found = task.call_with_targets(model, few, own)
        counted = task.units(own)
        loss = task.training_loss(found, own, counted)
        assert isinstance(loss, Tensor), f"{name}: the loss is a {type(loss).__name__}, no tensor"
        assert loss.ndim == 0, f"{name}: the mean loss must have no dimensions, not {[*loss.shape]}"
        return loss, float(task.evaluation_loss(found, own, counted).detach())

    loss, total = losses(torch.arange(count))
    assert bool(loss.isfinite()), f"{name}: the loss is {loss.item()}"
    model.zero_grad()
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters()), (
        f"{name}: the loss has no gradient"
    )
    found = [losses(part) for part in parts]
    mean = sum(part.item() * unit for (part, _), unit in zip(found, units, strict=True)) / whole
    _check_equal(f"{name}: the loss of two parts, weighted by units,", mean, loss.item())
    _check_equal(f"{name}: evaluation losses of two parts, added,", sum(f[1] for f in found), total)

    if task.measured:
        _check_metrics(task, name, [(prediction[part], targets[part]) for part in parts])


@torch.no_grad()
def _check_metrics(task: Task, name: str, parts: list[tuple[Tensor, Tensor]]) -> None:
    for metric_name, metric in task.measured.items():
        whole = metric.start()
        prediction, targets = (torch.cat(each) for each in zip(*parts, strict=True))
        whole.add(*task.metric_inputs(prediction, targets))
        expected = whole.value(lambda state: [state])
        own, other = metric.start(), metric.start()
        own.add(*task.metric_inputs(*parts[0]))
        other.add(*task.metric_inputs(*parts[1]))
        states: list[Tensor] = []

        def record(state: Tensor, states: list[Tensor] = states) -> list[Tensor]:
            states.append(state)
            return [state]

        with contextlib.suppress(Exception):  # one worker alone may have too few samples
            other.value(record)
        remaining = iter(states)
        value = own.value(lambda state, remaining=remaining: [state, next(remaining)])  # type: ignore[misc]
        _check_equal(f"{name}: metric {metric_name} of two workers", value, expected)
        assert metric.direction in ("maximize", "minimize"), (
            f"{name}: metric {metric_name} has the direction {metric.direction!r}"
        )


def _check_equal(what: str, value: float, expected: float) -> None:
    close = abs(value - expected) <= _TOLERANCE * max(abs(expected), 1e-3)
    assert close or (value != value and expected != expected), f"{what}: {value}, not {expected}"
