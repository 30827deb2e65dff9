"""The contract of a layer that `Quantize(layers=[...])` can quantize."""

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.compress.parametrize import compression
from trainer.compress.quantize import WeightQuantizer, broadcast_scale
from trainer.compress.rewrite import restore
from trainer.compress.select import weights
from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError, first_line
from trainer.phases import Quantize

_TOLERANCE = 0.1  # of the largest output, for weights and inputs of 8 bits


def check_quantized_layer(
    make: Callable[[], nn.Module], *inputs: Any, bits: int = 8, onnx: bool = False
) -> None:
    """Check that a layer can be quantized, stored and loaded.

    The layer must read its weights, which are float32 parameters, whenever it is called. Quantized,
    it must still compute nearly the same, and a file of it must give the same outputs bit for bit.

    Args:
        make: Builds the layer, with random weights.
        inputs: Arguments of a call; the first dimension of the first one counts samples.
        bits: Bits of weights and inputs; with few bits, outputs may differ as much as they will.
        onnx: Whether to check the export to ONNX, too. The layer must have one argument then, and
            the packages of the extra `onnx` must be installed.

    Raises:
        AssertionError: The layer does not keep the contract; the text says in what.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        _check(make, inputs, bits, onnx)


def _check(make: Callable[[], nn.Module], inputs: tuple[Any, ...], bits: int, onnx: bool) -> None:
    layer = make()
    kind = type(layer).__name__
    model = _Model(layer).eval()
    world = World.single(torch.device("cpu"))
    expected = _outputs(model, inputs)
    if not torch.equal(_outputs(model, inputs), expected):
        raise AssertionError(f"{kind}: two calls with the same inputs give different outputs")
    phase = Quantize(
        bits, fit=FitConfig(epochs=1), activations=bits, outputs=["*"], layers=[type(layer)]
    )
    try:
        phase.check_model(model)
    except ConfigError as error:
        raise AssertionError(f"{kind}: Quantize refuses it: {error}") from error
    phase.enter(model, world)
    _train(model, kind, inputs)
    phase.after_step(model, world, 1, 1)
    phase.leave(model)
    model.eval()

    for name, places in weights(model).items():
        module, attribute = places[0]
        quantizer = getattr(module, f"{attribute}_quantizer")
        assert isinstance(quantizer, WeightQuantizer)
        steps = places[0].value / broadcast_scale(quantizer.scale, places[0].value.ndim)
        if bool(((steps - steps.round()).abs() > 1e-3).any()):
            raise AssertionError(f"{kind}: {name} is not on its grid after the phase")
    quantized = _outputs(model, inputs)
    difference = float((quantized - expected).abs().amax() / expected.abs().amax().clamp_min(1e-12))
    if bits == 8 and not difference <= _TOLERANCE:
        raise AssertionError(
            f"{kind}: with 8 bits the outputs differ by {difference:.0%} of the largest one"
        )
    if not torch.equal(_outputs(copy.deepcopy(model), inputs), quantized):
        raise AssertionError(f"{kind}: a copy of the quantized layer computes something else")
    content = artifact.encode({name: value.clone() for name, value in model.state_dict().items()})
    try:
        decoded = restore(_Model(make()), artifact.loads(content)).eval()
    except RuntimeError as problem:
        raise AssertionError(f"{kind}: its file cannot be loaded: {problem}") from problem
    if not torch.equal(_outputs(decoded, inputs), quantized):
        raise AssertionError(f"{kind}: loaded from a file, it computes something else")
    if onnx:
        _check_onnx(model.layer, kind, inputs, quantized)


def _train(model: nn.Module, kind: str, inputs: tuple[Any, ...]) -> None:
    """A forward and a backward pass, in which all weights must be used."""
    reads: list[str] = []
    for name, places in weights(model).items():
        made = cast(nn.Module, compression(*places[0]))
        made.register_forward_hook(lambda *_, name=name: reads.append(name))
    reads.clear()
    _first(model.train()(*inputs)).square().sum().backward()
    used = set(reads)
    for name, places in weights(model).items():
        own = name.removeprefix("layer.")
        if name not in used:
            raise AssertionError(
                f"{kind}: forward() does not read {own}; it must, at each call, and must not keep "
                "a weight from one call to the next"
            )
        grad = places[0].trainable.grad
        if grad is None or not bool(grad.to_dense().any()):
            raise AssertionError(f"{kind}: no gradient reaches {own}")


def _check_onnx(layer: nn.Module, kind: str, inputs: tuple[Any, ...], expected: Tensor) -> None:
    from trainer.export.onnx import to_onnx  # an extra
    from trainer.export.runtime import OnnxModel

    (sample,) = inputs
    try:
        found = torch.from_numpy(OnnxModel(to_onnx(_First(layer), sample))(sample))
    except (RunError, RuntimeError, ValueError) as error:
        raise AssertionError(f"{kind}: the export to ONNX fails: {first_line(error)}") from error
    # A rounding may fall the other way.
    difference = float((found - expected).abs().amax() / expected.abs().amax().clamp_min(1e-12))
    if not difference <= _TOLERANCE:
        raise AssertionError(f"{kind}: in onnxruntime the outputs differ by {difference:.0%}")


class _Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: Any) -> Tensor:
        return _first(self.layer(*inputs))


class _First(_Model):
    """As `_Model`, for one argument; torch.export takes no other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _first(output: Any) -> Tensor:
    """The output, or the first of several."""
    return cast(Tensor, output if isinstance(output, Tensor) else output[0])


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(*inputs))
