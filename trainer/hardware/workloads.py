"""The matrix products of a model's forward pass: sizes, densities and activations of each."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.rnn import PackedSequence

from trainer import artifact
from trainer.compress.attention import without_fast_path
from trainer.compress.rewrite import restore
from trainer.engine.cost import macs
from trainer.errors import ConfigError
from trainer.hardware.figures import Figure

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_INSIDE = Figure(1.0, "assumed")  # density of activations that a layer of torch does not show


@dataclass(frozen=True)
class Workload:
    """The products with one weight, for one sample.

    A convolution is the product of its patches (im2col), a row for each position of the result; a
    transposed one has a row for each position of its input, whose products are added up (col2im).
    """

    weight: str
    """Name of the parameter, such as "fc1.weight" or "lstm.weight_hh_l0"."""
    kind: str
    """linear, convolution, or recurrent."""
    rows: int
    """Rows of the product: positions, or time steps of all sequences."""
    inputs: int
    """Length of the inner dimension."""
    outputs: int
    """Columns of the product, of each group."""
    groups: int
    """Independent products: groups of a convolution."""
    nonzero: int
    """Weights that are not zero."""
    input_values: int
    """Activations that are read, each once."""
    output_values: int
    """Activations that are written."""
    activation_density: Figure
    """Fraction of the activations that are not zero."""
    calls: int = 1
    """Parts of the rows that are computed one after the other: calls of the layer, or time steps of
    a product with the previous results."""

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.inputs * self.outputs * self.groups

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates with all weights."""
        return self.rows * self.weights

    @property
    def macs(self) -> int:
        """Multiply-accumulates with weights that are not zero."""
        return self.rows * self.nonzero


@torch.no_grad()
def workloads(model: nn.Module, samples: Tensor) -> list[Workload]:
    """Run a model and list the products of its linear, convolutional and recurrent layers.

    Of attention, the projections are listed. Products of two activations, and others, are not; see
    `uncounted_macs`.

    Args:
        model: With plain weights; it comes back in the mode that it was in.
        samples: Inputs [N, ...] on the model's device; densities are averages over them.

    Raises:
        ConfigError: There are no samples, or a recurrent layer gets a packed sequence.
    """
    if not len(samples):
        raise ConfigError("samples: the costs of a model need at least one")
    found: dict[str, Workload] = {}
    names = {module: name for name, module in model.named_modules()}

    def record(
        module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        for new in _products(names[module], module, args, named, output):
            old = found.get(new.weight)
            found[new.weight] = new if old is None else _together(old, new)

    kinds = (nn.Linear, nn.RNNBase, nn.MultiheadAttention, _ConvNd)
    hooks = [
        module.register_forward_hook(record, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, kinds)
    ]
    training = model.training
    model.eval()
    try:
        with without_fast_path():
            model(samples)
            whole = list(found.values())
            found.clear()
            model(samples[:1])  # for its number of calls
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    calls = {name: x.calls for name, x in found.items()}
    return [_for_one_sample(x, len(samples), calls.get(x.weight, 1)) for x in whole]


def uncounted_macs(model: nn.Module, sample: Tensor, found: Sequence[Workload]) -> int:
    """Multiply-accumulates for a sample that belong to no workload.

    These are products that no linear, convolutional or recurrent layer computes, such as those of
    queries and keys in attention: the costs of the workloads do not contain them.

    Args:
        model: The model that the workloads were listed of.
        sample: Inputs [1, ...].
        found: Its workloads.
    """
    return macs(model, sample) - sum(x.macs for x in found)


@torch.no_grad()
def read_fractions(model: nn.Module, samples: Tensor) -> dict[str, float]:
    """The fraction of each embedding's rows that a batch looks up, by the name of its weight.

    A weight that several embeddings share has the name of the first, and the rows that any of them
    looks up. Embeddings whose weight is also that of another layer, which reads all of it, are left
    out.

    Args:
        model: As for `workloads`.
        samples: The batch.
    """
    names = {module: name for name, module in model.named_modules()}
    embeddings: dict[nn.Module, Tensor] = {
        module: module.weight for module in names if isinstance(module, _EMBEDDINGS)
    }
    elsewhere = {id(p) for m in names if m not in embeddings for p in m._parameters.values()}
    stored: dict[int, str] = {}
    for module, weight in embeddings.items():
        stored.setdefault(id(weight), f"{names[module]}.weight".removeprefix("."))
    seen: dict[str, set[int]] = {}

    def record(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = args[0] if args else next(iter(named.values()))
        seen.setdefault(stored[id(embeddings[module])], set()).update(tokens.unique().tolist())

    hooks = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for module, weight in embeddings.items()
        if id(weight) not in elsewhere
    ]
    training = model.training
    model.eval()
    try:
        model(samples)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {name: len(rows) / len(model.get_parameter(name)) for name, rows in seen.items()}


def artifact_workloads(
    path: str | os.PathLike[str], model: nn.Module, samples: Tensor
) -> list[Workload]:
    """As `workloads`, with the weights of a .dcz file.

    Args:
        path: Of the file.
        model: A fresh model of the same class and settings; it takes the weights of the file.
        samples: Inputs [N, ...].

    Raises:
        trainer.artifact.ArtifactError: The file is damaged.
        RuntimeError: The file is that of another model.
    """
    return workloads(restore(model, artifact.load(path)), samples)


def _products(
    name: str, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any
) -> Sequence[Workload]:
    """The products of one call, for all samples."""
    source = args[0] if args else next(iter(named.values()))
    if isinstance(module, nn.MultiheadAttention):
        given = {**dict(zip(("query", "key", "value"), args, strict=False)), **named}
        return _projections(name, module, given["query"], given["key"], given["value"])
    if isinstance(module, nn.RNNBase):
        return _recurrent(name, module, source)
    layer = cast(nn.Linear, module)  # or a convolution
    weight = layer.weight
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):
        positions, inputs, outputs = source, len(weight) // groups, weight[0].numel()
    else:
        positions, inputs, outputs = output, weight[0].numel(), len(weight) // groups
    return [
        Workload(
            weight=f"{name}.weight".removeprefix("."),
            kind="linear" if isinstance(module, nn.Linear) else "convolution",
            rows=positions.numel() // len(weight),
            inputs=inputs,
            outputs=outputs,
            groups=groups,
            nonzero=int(weight.count_nonzero()),
            input_values=source.numel(),
            output_values=output.numel(),
            activation_density=_density(source),
        )
    ]


def _projections(
    name: str, module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor
) -> list[Workload]:
    """The products of attention with its weights.

    Not listed: those of `in_proj_weight` where queries and keys have different shapes, since its
    thirds then have different numbers of rows.
    """
    if module.in_proj_weight is None:
        weights = {"q_proj_weight": query, "k_proj_weight": key, "v_proj_weight": value}
    else:
        weights = {"in_proj_weight": query} if query.shape == key.shape else {}
    weights["out_proj.weight"] = query  # its input is one of queries, with other values
    found = []
    for parameter, source in weights.items():
        weight, rows = module.get_parameter(parameter), math.prod(source.shape[:-1])
        density = _INSIDE if parameter == "out_proj.weight" else _density(source)
        found.append(_matrix(f"{name}.{parameter}", "linear", weight, rows, density))
    return found


def _recurrent(name: str, module: nn.RNNBase, source: Any) -> list[Workload]:
    """The products with the inputs and with the previous results, of each layer and direction."""
    if isinstance(source, PackedSequence):
        raise ConfigError(f"{name}: workloads are counted on padded tensors, not packed sequences")
    steps = math.prod(source.shape[:-1])
    length = source.shape[1 if module.batch_first and source.dim() == 3 else 0]
    found = []
    for parameter, weight in module.named_parameters():
        if not parameter.startswith("weight"):
            continue
        density = _density(source) if parameter.startswith("weight_ih_l0") else _INSIDE
        calls = 1 if parameter.startswith("weight_ih") else length
        found.append(_matrix(f"{name}.{parameter}", "recurrent", weight, steps, density, calls))
    return found


def _matrix(
    name: str, kind: str, weight: Tensor, rows: int, density: Figure, calls: int = 1
) -> Workload:
    """The product of so many rows with a matrix [outputs, inputs]."""
    outputs, inputs = weight.shape
    return Workload(
        weight=name.removeprefix("."),
        kind=kind,
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        groups=1,
        nonzero=int(weight.count_nonzero()),
        input_values=rows * inputs,
        output_values=rows * outputs,
        activation_density=density,
        calls=calls,
    )


def _for_one_sample(x: Workload, samples: int, calls: int) -> Workload:
    """A workload of several samples as the average of one, rounded up, in so many calls."""
    rows = math.ceil(x.rows / samples)
    return replace(
        x,
        rows=rows,
        input_values=math.ceil(x.input_values / samples),
        output_values=math.ceil(x.output_values / samples),
        calls=max(1, min(calls, rows)),
    )


def _density(source: Tensor) -> Figure:
    return Figure(int(source.count_nonzero()) / max(1, source.numel()), "measured")


def _together(first: Workload, second: Workload) -> Workload:
    """Two calls of one layer."""
    inputs = first.input_values + second.input_values
    density = (
        first.activation_density.value * first.input_values
        + second.activation_density.value * second.input_values
    ) / max(1, inputs)
    return replace(
        first,
        rows=first.rows + second.rows,
        input_values=inputs,
        output_values=first.output_values + second.output_values,
        activation_density=Figure(density, first.activation_density.evidence),
        calls=first.calls + second.calls,
    )
