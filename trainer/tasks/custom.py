"""A task of the user's own: any loss, also one that the model computes."""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from trainer.data.split import IGNORED
from trainer.data.tree import tensors_of
from trainer.errors import ConfigError
from trainer.tasks import output as outputs
from trainer.tasks.base import Task, zero_of

MODEL = "model"
SEVERAL_OUTPUTS = (
    "a loss of several outputs needs task.whole_output=true, or is computed by the model: "
    "task.loss=model"
)
_COUNTS = ("samples", "targets")


@dataclass
class Custom(Task):
    """Any loss, and metrics of your own. Without metrics, the loss is the first metric.

    Args:
        loss: A function or module, called with the prediction and the targets of a batch. It
            returns their mean loss, or one loss for each unit. "model": the model computes its
            loss, `loss` of its output.
        whole_output: Whether the loss is called with all that the model returns, such as a tuple, a
            mapping or a dataclass, instead of the prediction in it. `auxiliary` is not used then.
        target_argument: Name of the argument by which the model receives the targets; None: it
            does not need them.
        count: What the loss is a mean over: "samples", or "targets": all values of the targets but
            those that are ignored. Micro-batches and workers are weighted by their number.
        ignore_index: Value of targets that are ignored, if count=targets.
    """

    kind: ClassVar[str] = "custom"

    _: KW_ONLY
    whole_output: bool = False
    target_argument: str | None = None
    count: str = "samples"
    ignore_index: int = IGNORED

    def check_settings(self) -> None:
        if not self.has_own_loss and self.loss != MODEL:
            raise ConfigError(
                f"loss={self.loss}: it must be a mapping with the _target_ of a loss, or "
                "loss=model if the model computes it"
            )
        if self.whole_output and not self.has_own_loss:
            raise ConfigError(
                "whole_output=true with loss=model: the model computes the loss itself; leave "
                "whole_output out"
            )
        if self.count not in _COUNTS:
            raise ConfigError(f"count={self.count}: it must be one of {', '.join(_COUNTS)}")

    @property
    def has_loss_of_prediction(self) -> bool:
        return self.has_own_loss and not self.whole_output

    @property
    def needs_prediction(self) -> bool:
        needed = self.has_loss_of_prediction or bool(self.measured)
        return needed or self.output is not None

    def call_with_targets(self, model: nn.Module, inputs: Any, targets: Tensor) -> Any:
        if self.target_argument is None:
            return self.call(model, inputs)
        named = {self.target_argument: targets}
        if isinstance(inputs, Mapping):
            return model(**inputs, **named)
        return model(*(inputs if isinstance(inputs, tuple | list) else (inputs,)), **named)

    def prediction(self, output: Any) -> Tensor:
        try:
            return super().prediction(output)
        except ValueError as error:
            if self.has_loss_of_prediction:
                raise ValueError(f"{error}; {SEVERAL_OUTPUTS}") from None
            raise

    def units(self, targets: Tensor) -> float:
        if self.count == "samples":
            return len(targets)
        return int((targets != self.ignore_index).sum())

    def full_units(self, targets: Tensor) -> int:
        return len(targets) if self.count == "samples" else targets.numel()

    def training_loss(self, output: Any, targets: Tensor, units: float) -> Tensor:
        if self.loss == MODEL:
            return outputs.model_loss(output)
        if self.whole_output:
            return self._loss_of_all(output, targets, units)
        return super().training_loss(output, targets, units)

    def evaluation_loss(self, output: Any, targets: Tensor, units: float) -> Tensor:
        if self.loss == MODEL:
            return outputs.model_loss(output).float() * units
        if self.whole_output:
            return self._loss_of_all(outputs.in_float(output), targets, units) * units
        return super().evaluation_loss(output, targets, units)

    def _loss_of_all(self, output: Any, targets: Tensor, units: float) -> Tensor:
        if not units:
            return zero_of(tensors_of(output))
        return self._own_loss(output, targets, targets, units)
