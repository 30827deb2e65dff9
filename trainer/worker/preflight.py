"""Checks with a few samples that data and model fit together, before the first step."""

import contextlib
import hashlib
import math
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import FitConfig
from trainer.data.checked import CheckedSplit, describe_sample
from trainer.data.datasets import DatasetSplit, preserved_generators
from trainer.data.split import IGNORED, SampleError, Split, Splits, TensorSplit, unwrapped
from trainer.data.streams import stream_of
from trainer.data.tree import describe, map_tensors, tensors
from trainer.engine.compiled import check_compiler
from trainer.engine.loop import micro_batches, steps_in
from trainer.engine.runtime import Runtime
from trainer.engine.schedules import check_schedule
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError, described, first_line
from trainer.tasks import output as outputs
from trainer.tasks.custom import SEVERAL_OUTPUTS

SCAN_SECONDS = 0.2  # time for finding unusable samples in a split that is not in memory
_SCAN_BATCH = 16  # samples
_COMPARED = 4  # samples of a stream that are read twice
# torch's warning for [k] and [k, 1], which become [k, k]; other broadcasts may be intended
_BROADCAST = (
    r"Using a target size \(torch\.Size\(\[(\d+)(, 1)?\]\)\) .*"
    r"the input size \(torch\.Size\(\[\1(?(2)|, 1)\]\)\)"
)
_OF_THE_USER = (RuntimeError, IndexError, KeyError, TypeError, ValueError)  # errors in their code
_LIBRARY = Path(torch.__file__).parent
_OURS = Path(__file__).parents[1]


def check_compatible(
    model: nn.Module, data: Splits, runtime: Runtime, fits: Sequence[FitConfig] = ()
) -> tuple[Splits, torch.Size]:
    """Refuse a model that cannot take the samples, or has no output for a target.

    All targets of a split in memory are checked. Of other splits, the first sample is checked, and
    as many more as all ranks together can read in a fifth of a second, beginning with those whose
    listed target (`Dataset.targets`) looks wrong. Model and random state do not change.

    Args:
        model: On the device of the run.
        data: Its three splits.
        runtime: What all phases share.
        fits: Training settings of the phases.

    Returns:
        The same data, whose remaining samples are checked as they are read; and the shape of the
        targets of one training sample, which is empty if a target is one class.

    Raises:
        ConfigError: Names the split, the sample, and the model. All ranks raise it if the first
            sample or `fits` are the reason, else perhaps one.
        RunError: A sample cannot be read.
    """
    trained = any(steps_in(len(data.train), runtime.batch_size, fit)[1] for fit in fits)
    for fit in fits:
        per_epoch, steps = steps_in(len(data.train), runtime.batch_size, fit)
        if steps:
            check_schedule(fit, fit.lr or runtime.optimizer.lr, steps, per_epoch)
    _check_parameters(model, runtime, trained)
    if trained and runtime.compile:
        check_compiler(runtime.compile, runtime.world.device)
    with _evaluating(model, runtime):
        checked = {
            name: _check_split(name, split, model, runtime, scan=True)
            for name, split in vars(data).items()
        }
        model.train()
        _, inputs, targets = checked["train"]
        for fit in fits:
            _check_mixing(inputs, targets, fit)
            _check_smallest_batch(data.train, inputs, targets, model, runtime, fit)
    splits = Splits(**{name: split for name, (split, _, _) in checked.items()})
    return splits, targets.shape[1:]


def check_split(name: str, split: Split, model: nn.Module, runtime: Runtime) -> Split:
    """Refuse a model that cannot take the first sample of a split.

    Args:
        name: Of the split, for messages: train, validation or test.
        split: The split.
        model: On the device of the run.
        runtime: What all phases share.

    Returns:
        The same split, whose remaining samples are checked as they are read.

    Raises:
        ConfigError: Names the split, the sample, and the model.
        RunError: The sample cannot be read.
    """
    with _evaluating(model, runtime):
        return _check_split(name, split, model, runtime, scan=False)[0]


@contextlib.contextmanager
def _evaluating(model: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Put the model in evaluation mode; restore its mode and the random state afterwards."""
    training = model.training
    device = runtime.world.device
    cuda = [device] if device.type == "cuda" else []
    try:
        with preserved_generators(), torch.random.fork_rng(cuda), torch.no_grad():
            model.eval()  # batch norm keeps its running statistics, dropout draws nothing
            yield
    finally:
        model.train(training)


def _check_parameters(model: nn.Module, runtime: Runtime, trained: bool) -> None:
    kind = type(model).__name__
    trainable = [p for p in model.parameters() if p.requires_grad]
    if trained and not trainable:
        raise ConfigError(
            f"model: there is nothing to train, because no parameter of {kind} requires a "
            "gradient; unfreeze some, or set fit.epochs=0 in every phase"
        )
    for name, parameter in model.named_parameters():
        if trained and parameter.requires_grad and parameter.is_complex():
            raise ConfigError(
                f"model: {name} is complex, and parameters that are trained must be real: make it "
                "of torch.view_as_real(...), and use torch.view_as_complex in forward"
            )
    if trained and runtime.precision == "fp16" and any(p.dtype == torch.float16 for p in trainable):
        raise ConfigError(
            f"precision=fp16: parameters of {kind} are float16 themselves, which loss scaling "
            "cannot train; build them as float32, or set precision=fp32"
        )


def _check_split(
    name: str, split: Split, model: nn.Module, runtime: Runtime, scan: bool
) -> tuple[CheckedSplit, Any, Tensor]:
    """The split, checked, and inputs and targets of its first sample."""
    kind, task = type(model).__name__, runtime.task
    with _readable(name, split):
        ((inputs, targets),) = _read(split, [torch.tensor([0])])
    if wrong := task.check_type(targets):
        raise ConfigError(
            f"data: the targets of {name} are {str(targets.dtype).removeprefix('torch.')}; {wrong}"
        )
    problem = f"data and model: {kind} cannot take a {name} sample ({describe(inputs)})"
    given = {x.dtype for x in tensors(inputs)}
    held = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if torch.float64 in given - held:
        problem += "; convert inputs to float32"
    elif held and torch.float32 in given - held:
        problem += "; convert the model with .float(), since inputs are float32"
    output = _forward(model, inputs, targets, runtime, problem)
    try:
        if task.needs_prediction:
            prediction = task.prediction(output)
        else:  # the loss is looked at instead
            prediction = torch.empty(0) if task.has_own_loss else outputs.model_loss(output)
        wrong = task.check(prediction, targets)
        shown = outputs.describe(prediction)
    except ValueError as error:
        raise ConfigError(f"data and model: {kind} returns {error}") from error
    if wrong:
        raise ConfigError(
            f"data and model: for targets {[*targets.shape]} of {name} {kind} returns {shown}; "
            f"{wrong}"
        )
    shape = prediction.shape
    checked = CheckedSplit(split, name, lambda found: task.check_values(found, shape))
    with _readable(name, split):
        checked.check_targets(torch.tensor([0]), targets)
        if isinstance(split, TensorSplit):
            checked.check_targets(torch.arange(len(split)), split.targets)
            if not task.units(split.targets):
                raise ConfigError(
                    f"data: every target of {name} is {getattr(task, 'ignore_index', IGNORED)}, "
                    "which is ignored"
                )
        elif scan:
            _check_repeatable(name, split, runtime.world)
            _scan(checked, runtime)
    _check_measures(name, output, targets, runtime)
    return checked, inputs, targets


def _check_measures(name: str, output: object, targets: Tensor, runtime: Runtime) -> None:
    """Refuse a loss or a metric that cannot be computed for the first sample, once and twice.

    Of one sample alone, a tensor [1] may be a mean or its value.
    """
    task = runtime.task
    units = task.units(targets)
    placed = targets.to(runtime.world.device)
    what = "loss"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", _BROADCAST)
            loss = task.evaluation_loss(output, placed, units)
            if loss.numel() != 1:
                raise ValueError(f"it returned {outputs.describe(loss)} for one sample")
            if task.has_loss_of_prediction or task.measured:
                prediction = task.prediction(output)
                if prediction.ndim and len(prediction) == 1:
                    prediction, placed = (torch.cat((x, x)) for x in (prediction, placed))
                    units *= 2
            if task.has_loss_of_prediction:
                task.mean_loss(prediction.float(), placed, units)
            if task.measured:
                what = "metrics"
                inputs = task.metric_inputs(prediction, placed)
            for metric_name, metric in task.measured.items():
                what = f"metrics.{metric_name}"
                metric.start().add(*inputs)
    except (*_OF_THE_USER, AttributeError, UserWarning) as error:
        if "CUDA error" in str(error):
            raise
        advice = ""
        if "Using a target size" in str(error):
            advice = "; give targets the shape of the output, such as targets[:, None]"
        elif what == "loss" and task.has_loss_of_prediction and not isinstance(output, Tensor):
            shown = outputs.describe(task.prediction(output))
            advice = f"; it is called with {shown} of the output alone: {SEVERAL_OUTPUTS}"
        raise ConfigError(
            f"task.{what}: it cannot be computed for a {name} sample (output "
            f"{outputs.describe(output)}, target {describe(targets) or 'a number'}): "
            f"{type(error).__name__}: {first_line(error)}{_source_line(error)}{advice}"
        ) from error


def _check_repeatable(name: str, split: Split, world: World) -> None:
    """Refuse a stream whose first samples differ between two readings or ranks. A collective call.

    It is a cheap check: streams may still differ later.
    """
    if (stream := stream_of(split)) is None:
        return
    found = torch.zeros(2, world.size, dtype=torch.int64)
    for reading in found:
        stream.forget()
        ((inputs, targets),) = _read(split, [torch.arange(min(len(stream), _COMPARED))])
        digest = hashlib.sha256()
        for tensor in tensors((inputs, targets)):
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        reading[world.rank] = int.from_bytes(digest.digest()[:6], "little")
    world.all_reduce(found)
    if not torch.equal(*found):
        raise ConfigError(
            f"data: the {name} stream yields other samples when it is read again; draw its random "
            "numbers from the global generators of torch, NumPy or Python, which are seeded for "
            "each sample, or from one that is seeded when it is opened"
        )
    if (found != found[0, 0]).any():
        raise ConfigError(
            f"data: the workers get different samples of the {name} stream; do not divide it "
            "by rank or node: each worker reads all of it and uses its share of each batch"
        )


def _scan(checked: CheckedSplit, runtime: Runtime) -> None:
    """Look for targets for which the model has no output, for SCAN_SECONDS."""
    rank, size = runtime.world.rank, runtime.world.size
    listed = checked.split.listed_targets() if isinstance(checked.split, DatasetSplit) else None
    if listed is not None:
        try:
            checked.check_targets(torch.arange(len(listed)), listed)
        except SampleError as error:  # a transform may still correct the target
            _check(checked, [torch.tensor([error.index])])
    _check(checked, torch.arange(rank, len(checked), size).split(_SCAN_BATCH), SCAN_SECONDS)


def _check(checked: CheckedSplit, order: Sequence[Tensor], seconds: float = math.inf) -> None:
    """Read samples and check their targets until the time is over."""
    if not order:
        return
    end = time.monotonic() + seconds
    for indices, (_, targets) in zip(order, _read(checked.split, order), strict=False):
        checked.check_targets(indices, targets)
        if time.monotonic() > end:
            return


def _read(split: Split, order: Iterable[Tensor]) -> Iterator[tuple[Any, Tensor]]:
    if isinstance(split, DatasetSplit):
        return split.probe(order)
    return split.batches(order, None)


@contextlib.contextmanager
def _readable(name: str, split: Split) -> Iterator[None]:
    """Convert an error of reading samples into one that is reported in one line."""
    try:
        yield
    except SampleError as error:
        raise ConfigError(f"data: {describe_sample(name, split, error)}") from error
    except (ConfigError, RunError):
        raise
    except Exception as error:
        raise RunError(f"data: the {name} data cannot be read: {described(error)}") from error


def _check_mixing(inputs: Any, targets: Tensor, fit: FitConfig) -> None:
    """Refuse samples [1, ...] that mixup and cutmix cannot mix."""
    key = f"fit.cutmix={fit.cutmix:g}" if fit.cutmix else f"fit.mixup={fit.mixup:g}"
    if not fit.mixes:
        return
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        raise ConfigError(
            f"{key}: it mixes inputs that are one tensor of floats; the training samples have "
            f"{describe(inputs)}"
        )
    if fit.cutmix and inputs.ndim != 4:
        raise ConfigError(
            f"{key}: it mixes images [channels, height, width]; the training samples are "
            f"{[*inputs.shape[1:]]}; set fit.mixup instead"
        )
    if not targets.is_floating_point() and targets.ndim != 1:
        raise ConfigError(
            f"{key}: it mixes samples that have one class each; their targets are "
            f"{[*targets.shape[1:]]}"
        )


def _check_smallest_batch(
    split: Split, inputs: Any, targets: Tensor, model: nn.Module, runtime: Runtime, fit: FitConfig
) -> None:
    """Try a forward pass in training mode with as few samples as the training will have.

    Batch norm, for example, may need two.

    Args:
        split: Of the training samples.
        inputs: Of the first sample [1, ...].
        targets: Likewise.
        model: In training mode.
        runtime: What all phases share.
        fit: Settings of the training.
    """
    size, batch_size, samples = runtime.world.size, runtime.batch_size, len(split)
    # Synchronized batch norm sees the samples of all ranks.
    parts = 1 if runtime.sync_batchnorm else size
    per_epoch, steps = steps_in(samples, batch_size, fit)
    if not steps:
        return
    last = samples % batch_size if steps >= per_epoch else 0
    sizes = [
        len(micro)
        for batch in {min(batch_size, samples), last}
        for rank in range(parts)
        for micro in micro_batches(torch.arange(batch), rank, parts, fit.accumulate)
    ]
    count = min(sizes)

    def repeated(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:]).contiguous()

    kind, task = type(model).__name__, runtime.task
    problem = (
        f"data.batch_size={batch_size} with cluster.workers={size} and "
        f"fit.accumulate={fit.accumulate}: {kind} cannot be trained on as little as {count} of "
        f"the {samples} training samples at a time; change data.batch_size if that is too few"
    )
    source = unwrapped(split)
    if isinstance(source, TensorSplit) or getattr(source, "collate", split) is None:
        few, given = map_tensors(repeated, inputs), repeated(targets)
    else:  # the samples of a batch need not be its rows
        with _readable("train", split):
            ((few, given),) = _read(split, [torch.zeros(count, dtype=torch.int64)])
    units = task.units(given)
    with torch.enable_grad():
        output = _forward(model, few, given, runtime, problem)
        try:
            loss = task.training_loss(output, given.to(runtime.world.device), units)
        except _OF_THE_USER as error:
            raise ConfigError(
                f"data and model: the loss of what {kind} returns in training mode, "
                f"{outputs.describe(output)}, cannot be computed: {first_line(error)}"
            ) from error
    if units and not loss.requires_grad:
        raise ConfigError(
            f"data and model: the loss of what {kind} returns in training mode does not depend on "
            "any parameter that requires a gradient; look for detach(), no_grad() or argmax() in "
            "forward and in the loss"
        )


def _forward(
    model: nn.Module, inputs: Any, targets: Tensor, runtime: Runtime, problem: str
) -> object:
    """The model's output for a batch; its buffers keep their values.

    Raises:
        ConfigError: The model raised an error because of the inputs; the message then begins with
            `problem`. Or the shape of a buffer in its state_dict changed.
    """
    device = runtime.world.device
    buffers = [
        (prefix, module, name, buffer, None if buffer is None else buffer.clone())
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        placed = runtime.place_batch(inputs, targets)
        with runtime.mixed_precision.autocast():
            output: object = runtime.task.call_with_targets(model, *placed)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # errors of kernels appear here, not later
    except torch.OutOfMemoryError:
        raise
    except _OF_THE_USER as error:
        if "CUDA error" in str(error):  # the process cannot use its GPU any more
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{problem}: {reason}{_source_line(error)}") from error
    for prefix, module, name, buffer, before in buffers:
        now = module._buffers.get(name)  # forward may have assigned another tensor
        shapes = [None if tensor is None else [*tensor.shape] for tensor in (before, now)]
        if shapes[0] != shapes[1] and name not in module._non_persistent_buffers_set:
            raise ConfigError(
                f"model: the shape of the buffer {prefix}{prefix and '.'}{name} changes in forward "
                f"from {shapes[0]} to {shapes[1]}, so that a fresh model could not load it; keep "
                "its shape, or register it with persistent=False"
            )
        module._buffers[name] = buffer
        if buffer is not None and before is not None:
            with torch.no_grad():
                buffer.copy_(before)
    return output


def _source_line(error: Exception) -> str:
    """The place where the user's code raised an error: " (net.py, line 12)"; "" if it did not."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if not (path.is_relative_to(_LIBRARY) or path.is_relative_to(_OURS)):
            return f" ({path.name}, line {frame.lineno})"
    return ""
