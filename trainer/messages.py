"""What a run tells whoever watches it: plain records, from rank 0 to the driver, in order."""

from dataclasses import dataclass, field
from pickle import PickleBuffer
from typing import Any


@dataclass(frozen=True)
class RunStarted:
    """Every worker has its model and its data."""

    workers: int
    device: str  # what rank 0 trains on
    parameters: int
    train: int  # training samples
    validation: int
    test: int


@dataclass(frozen=True)
class PhaseStarted:
    """A phase has been entered; its first step comes next."""

    index: int  # 0 is the first
    name: str
    kind: str
    epochs: int
    steps: int
    learnable: int  # numbers that the optimizer sees
    sparsity: float


@dataclass(frozen=True)
class Progress:
    """Where rank 0 is, a few times a second; loss is of its share of the batch."""

    phase: str
    epoch: int  # 1 is the first
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    images_per_second: float  # samples, over all workers


@dataclass(frozen=True)
class EpochEnded:
    """Means over an epoch, over all workers."""

    phase: str
    epoch: int  # 1 is the first
    step: int
    train_loss: float
    loss: float  # validation
    accuracy: float  # validation, fraction
    lr: float
    sparsity: float
    images_per_second: float
    skipped: int  # steps that loss scaling skipped


@dataclass(frozen=True)
class RoundRecord:
    """One round of a phase that goes on until it should not."""

    round: int  # 1 is the first
    sparsity: float
    accuracy: float  # validation, fraction
    loss: float  # validation, nats
    accepted: bool  # False: the model went back to the last state that was, unless it goes on
    stopped: str  # why this was the last round; empty: another one follows
    goes_on: bool = False  # not accepted yet: the next round goes on from where this one ended


@dataclass(frozen=True)
class RoundEnded:
    """A phase has judged a round."""

    phase: str
    record: RoundRecord


@dataclass(frozen=True)
class PhaseRecord:
    """One entry of `phases` in summary.json."""

    name: str
    kind: str
    seconds: float
    steps: int
    train_loss: float | None  # of the last epoch; None where nothing was trained
    accuracy: float  # validation, fraction
    loss: float  # validation, nats
    parameters: int
    learnable: int
    nonzero: int
    sparsity: float
    sent_bytes_per_step: int  # per worker
    images_per_second: float | None
    macs: int = 0  # multiply-accumulates per sample of weights that are not zero
    rounds: list[RoundRecord] = field(default_factory=list)  # of a phase that has such


@dataclass(frozen=True)
class PhaseEnded:
    """A phase has been folded back to plain weights."""

    index: int
    record: PhaseRecord
    weights: bytes  # the model's state_dict as a safetensors file


@dataclass(frozen=True)
class Checkpoint:
    """Where a phase stands, in all that is needed to go on from there."""

    phase: int  # index, 0 is the first
    step: int  # of the phase
    content: bytes | memoryview  # trainer.store.serialization.pack

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Let Ray move the content as it is: it arrives as a view of the object store's memory."""
        content = PickleBuffer(self.content) if protocol >= 5 else bytes(self.content)
        return _arrived, (self.phase, self.step, content)


def _arrived(phase: int, step: int, content: Any) -> Checkpoint:
    """A checkpoint as it comes out of its pickle; Ray's own buffers offer nothing but a view."""
    whole = content if isinstance(content, bytes) else memoryview(content).cast("B")
    return Checkpoint(phase, step, whole)


@dataclass(frozen=True)
class RunStopped:
    """The run was asked to stop, and did: nothing later than the last checkpoint was done."""


@dataclass(frozen=True)
class Measured:
    """One model on the test set."""

    name: str
    accuracy: float  # fraction
    loss: float  # nats
    parameters: tuple[str, ...] = ()  # the model's entries in its state_dict, tied ones once


@dataclass(frozen=True)
class Converted:
    """A model as an ONNX file, run by onnxruntime on one thread, on validation data."""

    name: str  # fp32 or int8
    file_bytes: int
    accuracy: float  # fraction
    torch_accuracy: float  # of the same model in PyTorch, fp32 arithmetic
    difference: float  # largest one of a logit, between the two
    milliseconds: dict[str, float]  # median per batch, by the samples in it
    content: bytes  # the file, of the run's last model; empty: not kept


Message = (
    RunStarted
    | PhaseStarted
    | Progress
    | RoundEnded
    | EpochEnded
    | Checkpoint
    | PhaseEnded
    | RunStopped
    | Measured
    | Converted
)
