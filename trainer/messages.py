"""Messages of a run: plain records, sent in order by rank 0 and the driver to the sinks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pickle import PickleBuffer
from typing import Any

# `metrics` of a message are those of the task by name, in order, such as {"accuracy": 0.98}; in
# summary.json and metrics.jsonl they are entries of the record itself.


class _Measured:
    """A message with metrics."""

    metrics: Mapping[str, float]

    @property
    def accuracy(self) -> float | None:
        """The metric "accuracy", a fraction; None if the task has no such metric."""
        return self.metrics.get("accuracy")


@dataclass(frozen=True)
class RunStarted:
    """Every worker has its model and its data."""

    workers: int
    device: str  # of rank 0
    parameters: int
    train: int  # training samples
    validation: int
    test: int
    phase_steps: tuple[int, ...] = ()  # maximum number of steps of each phase
    sequence_targets: bool = False  # a sample's targets are a sequence, as of a language model
    task: str = "classification"  # kind of the task
    directions: Mapping[str, str] = field(  # of its metrics by name: maximize or minimize
        default_factory=lambda: {"accuracy": "maximize"}
    )


@dataclass(frozen=True)
class PhaseStarted:
    """A phase has been entered; its first step comes next."""

    index: int  # 0 is the first
    name: str
    kind: str
    epochs: int
    steps: int
    learnable: int  # trainable values
    sparsity: float


@dataclass(frozen=True)
class Progress:
    """The position of the run, reported a few times a second."""

    phase: str
    epoch: int  # 1 is the first
    epochs: int
    step: int
    steps: int
    loss: float  # of the last step's global batch
    lr: float
    images_per_second: float  # samples, over all workers


@dataclass(frozen=True)
class EpochEnded(_Measured):
    """Means over an epoch, over all workers."""

    phase: str
    epoch: int  # 1 is the first
    step: int
    train_loss: float
    loss: float  # validation
    metrics: Mapping[str, float]  # validation
    lr: float
    sparsity: float
    images_per_second: float
    skipped: int  # steps that loss scaling skipped
    usage: Mapping[str, Any] = field(default_factory=dict)  # of the phase so far: see PhaseRecord


@dataclass(frozen=True)
class RoundRecord(_Measured):
    """One round of a phase that has several."""

    round: int  # 1 is the first
    sparsity: float
    metrics: Mapping[str, float]  # validation
    loss: float  # validation
    accepted: bool  # False: the last accepted weights were restored, unless the round is extended
    stopped: str  # why this was the last round; empty: another round follows
    extended: bool = False  # not accepted yet: the next round continues from this one's weights


@dataclass(frozen=True)
class RoundEnded:
    """A round of a phase has ended."""

    phase: str
    record: RoundRecord


@dataclass(frozen=True)
class PhaseRecord(_Measured):
    """One entry of `phases` in summary.json."""

    name: str
    kind: str
    seconds: float
    steps: int
    train_loss: float | None  # of the last epoch; None if nothing was trained
    metrics: Mapping[str, float]  # validation
    loss: float  # validation
    parameters: int
    learnable: int
    nonzero: int
    sparsity: float
    sent_bytes_per_step: int  # per worker
    images_per_second: float | None
    data_wait: float | None = None  # fraction of the training time that a worker waited for data
    macs: int = 0  # multiply-accumulates per sample of weights that are not zero
    rounds: list[RoundRecord] = field(default_factory=list)  # of a phase with rounds
    # Of all workers: cpu_seconds (with data loaders), gpu_seconds, joules (measured; None: not),
    # reason (why they were not).
    usage: Mapping[str, Any] = field(default_factory=dict)
    # With `profile`: the steps that were measured, and for each rank the mean time of a step in
    # milliseconds, by section (trainer.engine.profile).
    profile: dict[str, Any] | None = None


@dataclass(frozen=True)
class PhaseEnded:
    """A phase has been folded back to plain weights."""

    index: int
    record: PhaseRecord
    weights: bytes  # the model's state_dict as a safetensors file


@dataclass(frozen=True)
class Traced:
    """The traces of some steps of a phase."""

    index: int  # of the phase; 0 is the first
    name: str
    traces: list[bytes]  # of each rank, in Chrome's format, compressed with gzip


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run within a phase: everything that is needed to resume there."""

    phase: int  # index, 0 is the first
    step: int  # of the phase
    content: bytes | memoryview  # made by trainer.store.serialization.pack

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Let Ray move the content without copies; it arrives as a view of the object store."""
        content = PickleBuffer(self.content) if protocol >= 5 else bytes(self.content)
        return _arrived, (self.phase, self.step, content)


def _arrived(phase: int, step: int, content: Any) -> Checkpoint:
    """Rebuild a checkpoint from its pickle. Ray's buffers can only be used as views."""
    whole = content if isinstance(content, bytes) else memoryview(content).cast("B")
    return Checkpoint(phase, step, whole)


STEP_UPDATED, STEP_COUNTED, STEP_COMPLETE = 0, 1, 2
"""Completed parts of a step: the update of the weights; also the work of the phase; also everything
after the last step of an epoch or phase, such as the evaluation."""


@dataclass(frozen=True)
class Handover:
    """The state of one rank when its group ends because a rank was lost or others join.

    Every rank keeps its state in memory, and the next group continues from one of them. It is not
    sent to the driver.
    """

    checkpoint: Checkpoint
    stage: int  # STEP_UPDATED, STEP_COUNTED or STEP_COMPLETE

    @property
    def position(self) -> tuple[int, int, int]:
        """Phase, step and stage; a larger one is further ahead."""
        return self.checkpoint.phase, self.checkpoint.step, self.stage


@dataclass(frozen=True)
class RunStopped:
    """The run stopped on request. Nothing was done after the last checkpoint."""

    changes_members: bool = False  # it continues at once, with another group of workers


@dataclass(frozen=True)
class Evaluated(_Measured):
    """One model on the test set."""

    name: str
    metrics: Mapping[str, float]
    loss: float
    parameters: tuple[str, ...] = ()  # the model's entries in its state_dict, tied ones once


TRIAL_MEASURES = ("bytes", "latency", "energy", "tpu_cycles", "eie_cycles")
"""What workers can measure of the final model of a trial: see trainer.worker.trial."""


@dataclass(frozen=True)
class TrialMeasured:
    """A worker measured the final model of a trial."""

    name: str  # of TRIAL_MEASURES
    value: float


@dataclass(frozen=True)
class Exported(_Measured):
    """A model as an ONNX file, run by onnxruntime on one thread, on validation data."""

    name: str  # fp32 or int8
    file_bytes: int
    metrics: Mapping[str, float]
    torch_metrics: Mapping[str, float]  # of the same model in PyTorch, fp32 arithmetic
    difference: float  # largest difference of an output between the two
    milliseconds: dict[str, float]  # median per batch, by the samples in it
    content: bytes  # the file, of the run's last model; empty: not kept


@dataclass(frozen=True)
class Notice:
    """One line for the user, such as a warning, which is also logged."""

    text: str


@dataclass(frozen=True)
class Status:
    """The current activity of the run, in a few words; valid until the next status or phase."""

    text: str


@dataclass(frozen=True)
class WorkersStarted:
    """All workers are up; sent again after workers were replaced."""

    nodes: list[str]  # host name of each rank


@dataclass(frozen=True)
class WorkersLost:
    """Workers were lost, and the run restarts from the last checkpoint.

    With `cluster.min_workers`, it continues with the others: see `MembersChanged`.
    """

    reason: str
    detail: str  # a traceback, or what is known about their death
    restart: int  # number of this restart in the current command; 1 is the first
    elastic: bool = False  # the others continue
    counted: bool = True  # against cluster.max_restarts; False: the host has left the cluster


@dataclass(frozen=True)
class MembersChanged:
    """A group of workers has started in an elastic run: one line of members.jsonl.

    The group continues from the state of one rank of the previous group, or from a checkpoint.
    """

    phase: int  # index of the phase in which it starts
    step: int  # steps done of that phase; 0: it begins
    stage: int  # of that step: STEP_UPDATED, STEP_COUNTED or STEP_COMPLETE
    workers: int
    nodes: list[str]  # host name of each rank
    source: int  # rank in the previous group whose state is continued; 0 after a checkpoint
    reason: str  # reason for the change of the group
    seconds: float  # since the loss or the change was noticed, until the group was ready to train
    time: str  # when it was ready, in ISO 8601


@dataclass(frozen=True)
class HeadLost:
    """The head node of the Ray cluster does not answer. Ray ends the driver if it stays lost."""

    address: str  # host:port
    deadline: float  # time.monotonic() at which to save and stop, to be faster than Ray


@dataclass(frozen=True)
class HeadRecovered:
    """The head node answers again."""

    address: str  # host:port


@dataclass(frozen=True)
class Resumed:
    """The run continues from a point; all later reports are invalid.

    Sent before the first message of the workers, also when the point is the beginning.
    """

    phase: int  # index of the phase that runs next, or is resumed
    step: int  # steps done of that phase; 0: it begins
    names: list[str]  # of all phases, in order
    records: list[Mapping[str, Any]]  # of the phases that ended, as in summary.json
    progress: Mapping[str, Any]  # seconds and restarts up to the point
    is_evaluated: bool = True  # False: the evaluation after that step is still to come

    @property
    def is_beginning(self) -> bool:
        """Whether nothing has been done yet."""
        return self.phase == self.step == 0

    @property
    def steps_before(self) -> int:
        """Steps of the phases that ended."""
        return sum(record["steps"] for record in self.records)


@dataclass(frozen=True)
class RunEnded:
    """The last message of a run."""

    summary: Mapping[str, Any]  # the content of summary.json


Message = (
    Notice
    | Status
    | WorkersStarted
    | WorkersLost
    | MembersChanged
    | HeadLost
    | HeadRecovered
    | Resumed
    | RunStarted
    | PhaseStarted
    | Progress
    | RoundEnded
    | EpochEnded
    | Checkpoint
    | PhaseEnded
    | Traced
    | TrialMeasured
    | Handover
    | RunStopped
    | Evaluated
    | Exported
    | RunEnded
)
"""Everything that a run reports. Sinks receive these in order."""
