"""The calls that a model makes for some samples, with the shape and range of each result."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from trainer.compress.recurrent import LinearLSTM, LinearRecurrent
from trainer.errors import ConfigError, first_line

# What a call does, from the modules, functions and methods that do it.
_OPERATIONS: dict[str, tuple[object, ...]] = {
    "linear": (nn.Linear,),
    "convolution": (nn.Conv2d,),
    "lstm": (LinearLSTM,),
    "embedding": (nn.Embedding,),
    "relu": (nn.ReLU, "relu", torch.relu, F.relu),
    "sigmoid": (nn.Sigmoid, "sigmoid", torch.sigmoid),
    "tanh": (nn.Tanh, "tanh", torch.tanh),
    "max_pool": (nn.MaxPool2d, F.max_pool2d, torch.max_pool2d),
    "average_pool": (nn.AvgPool2d, F.avg_pool2d),
    "adaptive_pool": (nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d),
    "mean": ("mean", torch.mean),
    "flatten": (nn.Flatten, "flatten", torch.flatten, "view", "reshape", torch.reshape),
    "add": (operator.add, operator.iadd, "add", torch.add),
    "getitem": (operator.getitem,),
    "pad": (F.pad,),
    "nothing": (nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, "contiguous"),
}
_FUNCTIONS = {x: kind for kind, names in _OPERATIONS.items() for x in names}


@dataclass(frozen=True)
class Result:
    """Properties of a tensor that a call returned for the samples."""

    shape: tuple[int, ...]
    low: float
    high: float


@dataclass(frozen=True)
class Trace:
    """The calls of a model, without those that change nothing in evaluation."""

    modules: nn.Module
    nodes: Sequence[fx.Node]
    results: dict[fx.Node, Result]
    """Of the calls that return one tensor."""

    def kind(self, node: fx.Node) -> str:
        """The kind of a call: a key of the operations above, input, output, or empty if unknown."""
        if node.op in ("placeholder", "output"):
            return {"placeholder": "input"}.get(node.op, node.op)
        target: Any = type(self.module(node)) if node.op == "call_module" else node.target
        return _FUNCTIONS.get(target, "")

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.modules.get_submodule(str(node.target))

    def describe(self, node: fx.Node) -> str:
        """A call in words, for messages."""
        if node.op == "call_module":
            return f"{node.target} ({type(self.module(node)).__name__})"
        name = node.target if isinstance(node.target, str) else node.target.__name__
        return f"{node.name} ({name})"

    def refusal(self, node: fx.Node, detail: str = "") -> ConfigError:
        """The error for a call that the TPU model cannot execute."""
        name = " ".join(filter(None, (self.describe(node), detail)))
        return ConfigError(
            f"the TPU cannot execute {name}; it executes Linear, Conv2d, LSTM, ReLU, sigmoid, "
            "tanh, pooling, flatten and residual additions"
        )

    def argument(self, node: fx.Node, name: str, position: int, default: Any = None) -> Any:
        """An argument of a call; of a module, its attribute."""
        if node.op == "call_module":
            return getattr(self.module(node), name, default)
        if name in node.kwargs:
            return node.kwargs[name]
        return node.args[position] if len(node.args) > position else default


def trace(model: nn.Module, samples: Tensor) -> Trace:
    """Follow a model and compute it once. It comes back in the mode that it was in.

    Raises:
        ConfigError: torch.fx cannot follow the model, or it cannot take the samples.
    """
    if not len(samples):
        raise ConfigError("samples: the TPU needs at least one")
    training = model.training
    model.eval()
    try:
        graph = _Tracer().trace(model)
        module = fx.GraphModule(model, graph)
        recorder = _Recorder(module)
        with torch.no_grad():
            recorder.run(samples)
    except Exception as error:  # the model's code may raise anything
        raise ConfigError(
            f"{type(model).__name__} cannot be compiled for the TPU, since torch.fx cannot follow "
            f"it: {first_line(error)}"
        ) from error
    finally:
        model.train(training)
    results = recorder.results
    if not all(math.isfinite(x.low) and math.isfinite(x.high) for x in results.values()):
        raise ConfigError(f"{type(model).__name__} computes infinite or NaN values for the samples")
    traced = Trace(module, list(graph.nodes), results)
    for node in traced.nodes:
        if traced.kind(node) == "nothing":
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            graph.erase_node(node)
    graph.eliminate_dead_code()
    return Trace(module, list(graph.nodes), results)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LinearRecurrent) or super().is_leaf_module(m, module_qualified_name)


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.results: dict[fx.Node, Result] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor) and value.numel():
            low, high = torch.aminmax(value.float())
            self.results[n] = Result(tuple(value.shape), float(low), float(high))
        return value
