"""The settings of an experiment as dataclasses, with the checks that need only their values.

`Config` mirrors conf/config.yaml, whose comments document every setting. Checks that need a class,
such as whether a model accepts a setting, are made by `trainer.experiment.Experiment`. All checks
raise `ConfigError` before anything starts.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config.drop import check_drop
from trainer.errors import ConfigError

PRECISIONS = ("fp32", "bf16", "fp16")
COMPILE_SETTINGS = ("backend", "mode", "dynamic", "fullgraph", "options")
CODERS = ("auto", "context", "columns", "huffman", "ans", "groups")
SCHEDULES = ("constant", "cosine", "polynomial", "one_cycle", "step")


def check_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError for a value that is not in `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value}: it must be one of {', '.join(allowed)}")


def check_min(key: str, value: float | None, low: float, *, excluded: bool = False) -> None:
    """Raise ConfigError for a number below `low` (or equal to it if `excluded`), NaN or infinity.

    None is accepted: it means that the setting is not set. What is no number is refused.
    """
    if value is None:
        return
    if not isinstance(value, int | float):
        raise ConfigError(f"{key}={value!r}: it must be a number")
    if not math.isfinite(value) or value < low or (excluded and value == low):
        raise ConfigError(f"{key}={value}: it must be {'above' if excluded else 'at least'} {low}")


def check_file_name(key: str, value: str) -> None:
    """Raise ConfigError for a text that cannot be the name of a file."""
    if not value or any(c in value for c in "/\\\0") or value in (".", ".."):
        raise ConfigError(f"{key}={value!r}: it must be usable as the name of a file")


@dataclass
class DistillConfig:
    """Knowledge distillation: learning from the outputs of the experiment's own dense model."""

    weight: float = 0.0  # weight of the dense model's outputs in the loss, in [0, 1]
    temperature: float = 4.0  # softens the outputs of both models

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"weight={self.weight}: it must be between 0 and 1")
        check_min("temperature", self.temperature, 0, excluded=True)


@dataclass
class FitConfig:
    """Training settings of a phase. With `epochs: 0` it trains nothing."""

    epochs: int = 0  # passes over the training data
    lr: float | None = None  # peak learning rate; null: optimizer.lr
    # After the warm-up: constant | cosine (to zero) | polynomial (to zero) | one_cycle | step, or a
    # mapping with the `_target_` of a function or a scheduler of torch; in Python also a function.
    schedule: Any = "cosine"
    warmup_epochs: float = 0.0  # epochs of linear rise from zero to the peak
    power: float = 1.0  # schedule=polynomial: of the fraction of steps that remain; 1: linear
    step_epochs: int = 10  # schedule=step: epochs between drops
    step_gamma: float = 0.1  # schedule=step: factor of the learning rate at each drop
    accumulate: int = 1  # micro-batches per optimizer step
    clip: float | None = None  # maximum L2 norm of the gradient of all trainable values; null: none
    max_steps: int | None = None  # maximum number of optimizer steps; null: no maximum
    mixup: float = 0.0  # parameter of the Beta distribution of the samples' shares; 0: no mixup
    cutmix: float = 0.0  # likewise; with mixup, each batch takes one of them
    ema: float | None = None  # decay of the moving average of the weights; null: no average
    patience: int | None = None  # epochs without a better first metric until the phase ends early
    min_delta: float = 0.0  # patience: improvement of the first metric that counts, in its unit
    keep_best: bool = False  # whether the phase ends with the weights of its best evaluation
    # Pattern of parameters or modules -> first epoch of the phase that trains them; null: none.
    freeze: dict[str, int | None] = field(default_factory=dict)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        check_min("fit.epochs", self.epochs, 0)
        check_min("fit.lr", self.lr, 0, excluded=True)
        if not (isinstance(self.schedule, Mapping) or callable(self.schedule)):
            check_choice("fit.schedule", self.schedule, SCHEDULES)
        check_min("fit.warmup_epochs", self.warmup_epochs, 0)
        check_min("fit.power", self.power, 0, excluded=True)
        check_min("fit.step_epochs", self.step_epochs, 1)
        check_min("fit.step_gamma", self.step_gamma, 0, excluded=True)
        check_min("fit.accumulate", self.accumulate, 1)
        check_min("fit.clip", self.clip, 0, excluded=True)
        check_min("fit.max_steps", self.max_steps, 1)
        check_min("fit.mixup", self.mixup, 0)
        check_min("fit.cutmix", self.cutmix, 0)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ConfigError(f"fit.ema={self.ema}: it must be above 0 and below 1, such as 0.999")
        check_min("fit.patience", self.patience, 1)
        check_min("fit.min_delta", self.min_delta, 0)
        if self.min_delta and self.patience is None:
            raise ConfigError(
                f"fit.min_delta={self.min_delta:g} without fit.patience: set the number of epochs "
                "after which the phase ends if the metric improves by less"
            )
        for pattern, epoch in self.freeze.items():
            check_min(f"fit.freeze.{pattern}", epoch, 0)
        if self.epochs and self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"fit.warmup_epochs={self.warmup_epochs:g} with fit.epochs={self.epochs}: the "
                "learning rate would never reach its peak; warm up for less than all epochs"
            )
        if self.schedule == "one_cycle" and self.warmup_epochs:
            raise ConfigError(
                f"fit.warmup_epochs={self.warmup_epochs:g} with fit.schedule=one_cycle: the cycle "
                "begins with a warm-up of its own; set fit.warmup_epochs=0"
            )

    @property
    def mixes(self) -> bool:
        """Whether training samples are mixed."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass
class AllReduceConfig:
    """Averaging of gradients over the workers."""

    algorithm: str = (
        "ring"  # ring (this project's, over point-to-point sends) | native (gloo, NCCL)
    )
    wire: str = "fp32"  # number format of gradients on the network: fp32 | bf16 | fp16 | int8
    # Whether a step also sends what was lost in earlier ones; null: with int8 and `compression`.
    error_feedback: bool | None = None
    # Most MiB of gradients reduced together; a larger parameter: in pieces; a small model: on CPUs,
    # an eighth of its gradients, or 0.25.
    bucket_mb: float = 25.0
    segment_kb: int = 2048  # KiB of a ring message that are in flight at a time
    # What is sent of a gradient: none (all values) | powersgd (two narrow matrices) | topk (the
    # largest values), or a mapping with a `_target_`, a class of your own.
    compression: Any = "none"
    rank: int = 2  # compression=powersgd: columns of the two matrices
    fraction: float = 0.01  # compression=topk: of the values that each worker sends
    whole_steps: int = 100  # compression: first steps of a phase, in which all values are sent
    local_steps: int = 1  # optimizer steps between two averages of weights; 1: gradients instead
    outer_lr: float = 0.7  # local_steps: learning rate of the outer optimizer; 1: the plain average
    outer_momentum: float = 0.9  # local_steps: Nesterov momentum of the outer optimizer

    def __post_init__(self) -> None:
        check_choice("allreduce.algorithm", self.algorithm, ("ring", "native"))
        check_choice("allreduce.wire", self.wire, (*PRECISIONS, "int8"))
        if not isinstance(self.compression, Mapping):
            check_choice("allreduce.compression", self.compression, ("none", "powersgd", "topk"))
        check_min("allreduce.rank", self.rank, 1)
        if not 0 < self.fraction <= 1:
            raise ConfigError(
                f"allreduce.fraction={self.fraction}: it must be above 0 and at most 1"
            )
        check_min("allreduce.whole_steps", self.whole_steps, 0)
        if self.compression != "none" and self.wire == "int8":
            raise ConfigError(
                f"allreduce.wire=int8 with allreduce.compression={self.compression}: both compress "
                "gradients; set allreduce.wire to bf16 or fp32, or allreduce.compression=none"
            )
        if self.error_feedback and self.wire == "fp32" and self.compression == "none":
            raise ConfigError(
                "allreduce.error_feedback=true with allreduce.wire=fp32: nothing is rounded, so "
                "there is no error to send later; set allreduce.wire to bf16 or int8"
            )
        if self.is_lossy and self.algorithm == "native" and self.compression != "powersgd":
            key = "wire=int8" if self.wire == "int8" else "error_feedback=true"
            key = key if self.compression == "none" else f"compression={self.compression}"
            raise ConfigError(
                f"allreduce.{key} with allreduce.algorithm=native: gloo and NCCL cannot average "
                "like that; set allreduce.algorithm=ring"
            )
        check_min("allreduce.bucket_mb", self.bucket_mb, 0, excluded=True)
        check_min("allreduce.segment_kb", self.segment_kb, 1)
        check_min("allreduce.local_steps", self.local_steps, 1)
        check_min("allreduce.outer_lr", self.outer_lr, 0, excluded=True)
        if not 0 <= self.outer_momentum < 1:
            raise ConfigError(
                f"allreduce.outer_momentum={self.outer_momentum}: it must be at least 0 and below 1"
            )

    @property
    def feeds_back(self) -> bool:
        """Whether what was not sent in one step is sent in the next one."""
        if self.error_feedback is None:
            return self.wire == "int8" or self.compression != "none"
        return self.error_feedback

    @property
    def is_lossy(self) -> bool:
        """Whether gradients are averaged by trainer.engine.lossy."""
        return self.wire == "int8" or self.compression != "none" or self.feeds_back


@dataclass
class CheckpointConfig:
    """When a checkpoint is written within a phase. The end of each phase is always written."""

    every_steps: int | None = None  # optimizer steps between two; null: none by steps
    every_seconds: float | None = 60.0  # seconds between two; null: none by time
    keep: int = 2  # number of checkpoints within a phase that are kept, the latest ones

    def __post_init__(self) -> None:
        check_min("checkpoint.every_steps", self.every_steps, 1)
        check_min("checkpoint.every_seconds", self.every_seconds, 0, excluded=True)
        check_min("checkpoint.keep", self.keep, 1)


@dataclass
class ArtifactConfig:
    """The compressed model file, model.dcz."""

    make: bool = False  # write model.dcz at the end, and evaluate the model decoded from it
    dtype: str = "fp16"  # format of codebooks, biases and norms in it: fp16 (where it fits) | fp32
    # Coder of positions and indices: auto (the smallest) | context | columns | huffman | ans |
    # groups, or a mapping with a `_target_`, a class of your own; in Python also an object of it.
    coder: Any = "auto"
    max_seconds: float | None = 5.0  # estimated CPU time of coder=auto; null: no limit

    def __post_init__(self) -> None:
        check_choice("artifact.dtype", self.dtype, ("fp16", "fp32"))
        if not isinstance(self.coder, Mapping) and not hasattr(self.coder, "decode"):
            check_choice("artifact.coder", self.coder, CODERS)
        check_min("artifact.max_seconds", self.max_seconds, 0)


@dataclass
class ExportConfig:
    """The model in formats of other programs."""

    onnx: bool = False  # write model.onnx at the end, run it in onnxruntime, and compare


@dataclass
class LimitsConfig:
    """Limits on the result. A run that misses one ends with exit code 3."""

    max_accuracy_drop: float | None = None  # below the dense model's test accuracy, as a fraction
    # How much worse than the dense model's the first metric of the task may be on the test set: a
    # number in its unit, or a percentage of the dense model's value, such as "5%".
    max_drop: Any = None
    min_ratio: float | None = None  # 4 bytes per parameter / bytes of model.dcz
    max_megabytes: float | None = None  # of model.dcz, in 10^6 bytes

    def __post_init__(self) -> None:
        check_min("limits.max_accuracy_drop", self.max_accuracy_drop, 0)
        if self.max_accuracy_drop is not None and self.max_accuracy_drop > 1:
            raise ConfigError(
                f"limits.max_accuracy_drop={self.max_accuracy_drop:g}: it is a fraction, so that "
                f"{self.max_accuracy_drop:g} points are {self.max_accuracy_drop / 100:g}"
            )
        check_drop("limits.max_drop", self.max_drop)
        if self.max_drop is not None and self.max_accuracy_drop is not None:
            raise ConfigError(
                f"limits.max_drop={self.max_drop} with limits.max_accuracy_drop="
                f"{self.max_accuracy_drop:g}: both limit the first metric; set one of them"
            )
        check_min("limits.min_ratio", self.min_ratio, 0, excluded=True)
        check_min("limits.max_megabytes", self.max_megabytes, 0, excluded=True)

    @property
    def drop(self) -> float | str | None:
        """Allowed drop of the first metric; None: it is not limited."""
        found: float | str | None = self.max_drop
        return self.max_accuracy_drop if found is None else found


@dataclass
class CostConfig:
    """What energy costs, and the power that is assumed where a machine shows no energy counter."""

    price: float = 0.25  # of a kilowatt-hour, in `currency`
    currency: str = "EUR"
    grid: float = 450.0  # grams of CO2 equivalent for a kilowatt-hour
    cpu_watts: float = 10.0  # of a busy core with its share of caches and memory
    gpu_watts: float = 400.0  # of a GPU that trains

    def __post_init__(self) -> None:
        for key in ("price", "grid", "cpu_watts", "gpu_watts"):
            check_min(f"cost.{key}", getattr(self, key), 0)


@dataclass
class ClusterConfig:
    """The worker processes and their resources."""

    workers: int = 2  # data-parallel processes
    min_workers: int | None = None  # elastic: continue with as few as that; null: always `workers`
    backend: str = "ray"  # ray | inline (one worker in this process; a debugger works)
    device: str = "auto"  # auto (cuda if every worker can have a GPU) | cpu | cuda
    address: str | None = (
        None  # Ray cluster (host:port or auto); null: RAY_ADDRESS, or a private Ray
    )
    cpus_per_worker: float = 1.0  # CPUs that Ray reserves for a worker
    gpus_per_worker: float = 1.0  # GPUs that Ray reserves for a worker on cuda: 1 or a fraction
    threads: int | None = None  # torch threads of a worker; null: cpus_per_worker; inline: all CPUs
    nice: int = 0  # niceness of the worker processes (Ray's own default is 15)
    max_restarts: int = 3  # how often a run restarts after it lost a worker
    start_timeout_s: float = 60.0  # seconds to wait until the cluster has resources for all workers
    hang_timeout_s: float = 60.0  # seconds without progress after which a worker is replaced
    working_dir: str | None = None  # folder of your code for the workers of a remote cluster
    py_modules: list[str] = field(default_factory=list)  # further packages to send along
    replay: str | None = None  # members.jsonl of an elastic run, whose changes are repeated

    def __post_init__(self) -> None:
        check_min("cluster.workers", self.workers, 1)
        check_min("cluster.min_workers", self.min_workers, 1)
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ConfigError(
                f"cluster.min_workers={self.min_workers} with cluster.workers={self.workers}: it "
                "is the smallest number of workers with which a run continues; set it to at most "
                "cluster.workers"
            )
        if self.min_workers is not None and self.replay is not None:
            raise ConfigError(
                f"cluster.replay={self.replay} with cluster.min_workers={self.min_workers}: the "
                "file states how many workers there are; remove cluster.min_workers"
            )
        check_choice("cluster.backend", self.backend, ("ray", "inline"))
        check_choice("cluster.device", self.device, ("auto", "cpu", "cuda"))
        check_min("cluster.cpus_per_worker", self.cpus_per_worker, 0, excluded=True)
        check_min("cluster.gpus_per_worker", self.gpus_per_worker, 0, excluded=True)
        if self.gpus_per_worker > 1:
            raise ConfigError(
                f"cluster.gpus_per_worker={self.gpus_per_worker:g}: a worker trains on one GPU; "
                "set cluster.gpus_per_worker=1 and a higher number of cluster.workers"
            )
        if self.device == "cuda" and self.workers > 1 and self.gpus_per_worker < 1:
            raise ConfigError(
                f"cluster.gpus_per_worker={self.gpus_per_worker:g} with cluster.workers="
                f"{self.workers}: NCCL takes one GPU per rank; use whole GPUs, or one worker"
            )
        for path in (self.working_dir, *self.py_modules):
            if path and "://" not in path and not os.path.exists(path):
                raise ConfigError(
                    f"cluster.working_dir or py_modules: there is no file or folder {path}"
                )
        check_min("cluster.threads", self.threads, 1)
        check_min("cluster.max_restarts", self.max_restarts, 0)
        check_min("cluster.start_timeout_s", self.start_timeout_s, 0, excluded=True)
        check_min("cluster.hang_timeout_s", self.hang_timeout_s, 0, excluded=True)
        if not 0 <= self.nice <= 19:
            raise ConfigError(f"cluster.nice={self.nice}: it must be between 0 and 19")
        if self.backend == "inline" and self.workers != 1:
            raise ConfigError(
                f"cluster.workers={self.workers} with cluster.backend=inline: this process is the "
                "only worker; set cluster.workers=1, or cluster.backend=ray for more"
            )
        if self.backend == "inline":
            for key in ("address", "nice", "min_workers", "replay"):
                value = getattr(self, key)
                if value:
                    raise ConfigError(
                        f"cluster.{key}={value} with cluster.backend=inline: only Ray workers use "
                        f"it; remove cluster.{key}, or set cluster.backend=ray"
                    )

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change during a run."""
        return self.min_workers is not None or self.replay is not None


@dataclass
class SweepConfig:
    """The search of a sweep and its budget. Without `params` the experiment is not a sweep."""

    params: dict[str, Any] = field(default_factory=dict)  # key -> range in Hydra's override grammar
    lengths: dict[str, Any] = field(default_factory=dict)  # key whose value is a list -> its length
    conditions: dict[str, str] = field(default_factory=dict)  # key -> when it is searched
    trial_overrides: dict[str, Any] = field(default_factory=dict)  # settings of the trials only
    name: str = "sweep"  # folder under outputs/NAME/
    storage: str | None = None  # URL of Optuna's storage; null: SQLite in the sweep's folder
    objectives: dict[str, Any] = field(default_factory=dict)  # measure -> maximize | minimize
    constraints: dict[str, str] = field(default_factory=dict)  # measure -> bound, such as ">= 0.98"
    sampler: Any = "tpe"  # tpe | random | grid | nsga2 | settings of a class, with _target_
    startup_trials: int = 10  # trials drawn at random before the sampler learns from them
    pruner: Any = "median"  # median | asha | hyperband | none | settings of a class
    metric: str = (
        "accuracy"  # validation measure that the pruner watches: a metric of the task | loss
    )
    min_trials: int = 5  # pruner=median: trials that must end before one is pruned
    min_epochs: int = 1  # epochs that every trial gets
    reduction: int = 3  # pruner=asha, hyperband: one trial in so many continues at each level
    size_weight: float = (
        0.0  # several objectives: gain of metric that ten times fewer weights equal
    )
    trials: int | None = 50  # number of trials; null: no limit
    seconds: float | None = None  # duration of the sweep; null: no limit
    epochs: int | None = None  # epochs of all trials together; null: no limit
    slots: int | None = None  # trials at a time; null: as many as the cluster has resources for
    max_retries: int = 1  # how often a trial that failed starts again
    shared_phases: str | None = None  # last of the first phases that trials share; null: none
    analysis: str | None = None  # question that the trials answer: interference | sensitivity
    recycle_after: int = 100  # trials after which the workers of a slot are replaced
    refit: bool = False  # whether the best trial is run again, without trial_overrides, into best/

    def __post_init__(self) -> None:
        check_file_name("sweep.name", self.name)
        if not isinstance(self.sampler, Mapping):
            check_choice("sweep.sampler", self.sampler, ("tpe", "random", "grid", "nsga2"))
        if not isinstance(self.pruner, Mapping):
            check_choice("sweep.pruner", self.pruner, ("median", "asha", "hyperband", "none"))
        if self.analysis is not None:
            check_choice("sweep.analysis", self.analysis, ("interference", "sensitivity"))
        self.objectives = {k: v for k, v in self.objectives.items() if v is not None}
        for measure, direction in self.objectives.items():
            check_choice(f"sweep.objectives.{measure}", direction, ("maximize", "minimize"))
        if self.params and not self.objectives:
            raise ConfigError("sweep.objectives: there are none; give one, such as accuracy")
        check_min("sweep.startup_trials", self.startup_trials, 0)
        check_min("sweep.min_trials", self.min_trials, 1)
        check_min("sweep.min_epochs", self.min_epochs, 1)
        check_min("sweep.reduction", self.reduction, 2)
        check_min("sweep.size_weight", self.size_weight, 0)
        check_min("sweep.trials", self.trials, 1)
        check_min("sweep.seconds", self.seconds, 0, excluded=True)
        check_min("sweep.epochs", self.epochs, 1)
        check_min("sweep.slots", self.slots, 1)
        check_min("sweep.max_retries", self.max_retries, 0)
        check_min("sweep.recycle_after", self.recycle_after, 1)


@dataclass
class Config:
    """The settings of one experiment, as config.yaml holds them.

    Sections with a `_target_` stay plain mappings here: `trainer.experiment.Experiment` builds the
    objects that they describe.
    """

    name: str  # folder under outputs/, and title of the run
    model: dict[str, Any]
    data: dict[str, Any]
    optimizer: dict[str, Any]
    phases: dict[str, dict[str, Any]]  # `enabled: false` leaves a phase out
    task: dict[str, Any] = field(  # what is minimized and measured
        default_factory=lambda: {"_target_": "trainer.tasks.Classification"}
    )
    logger: dict[str, dict[str, Any]] = field(default_factory=dict)  # sinks besides the run's files
    init_from: str | None = None  # file or folder with the initial weights
    init_skip: list[str] = field(default_factory=list)  # names in the model that are not loaded
    init_strict: bool = True  # whether all other names and shapes must be those of the model
    seed: int = 0
    precision: str = "fp32"
    profile: bool = False  # measure the parts of each step, and write a trace of some steps
    channels_last: bool = False
    sync_batchnorm: bool = False
    compile: Any = False  # whether torch.compile is used, or a mapping of its arguments
    recompute: list[str] = field(default_factory=list)  # modules with gradient checkpointing
    allreduce: AllReduceConfig = field(default_factory=AllReduceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    artifact: ArtifactConfig = field(default_factory=ArtifactConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)

    def __post_init__(self) -> None:
        check_file_name("name", self.name)
        self.phases = _enabled(self.phases)
        for phase in self.phases:
            check_file_name("phases", str(phase))
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed={self.seed}: it must be at least 0 and below 2^63")
        batch_size = self.data.get("batch_size")
        if type(batch_size) is not int or batch_size < 1:
            raise ConfigError(f"data.batch_size={batch_size!r}: it must be a whole number above 0")
        if batch_size < self.cluster.workers:
            raise ConfigError(
                f"data.batch_size={batch_size} with cluster.workers={self.cluster.workers}: the "
                "global batch is split over the workers, so it must hold at least one sample each"
            )
        check_choice("precision", self.precision, PRECISIONS)
        self._check_execution()
        if self.allreduce.local_steps > 1:
            self._check_local_steps()
        if self.init_from is None and (self.init_skip or not self.init_strict):
            raise ConfigError(
                "init_skip and init_strict: there are no weights to load; set init_from to a file"
            )
        for limit in ("min_ratio", "max_megabytes"):
            if getattr(self.limits, limit) is not None and not self.artifact.make:
                raise ConfigError(
                    f"limits.{limit}={getattr(self.limits, limit)}: it limits the compressed file; "
                    "set artifact.make=true"
                )
        if self.sweep.params and (self.cluster.min_workers or self.cluster.replay):
            raise ConfigError(
                f"cluster.min_workers={self.cluster.min_workers}, cluster.replay="
                f"{self.cluster.replay} in a sweep: a trial has a fixed number of workers, and the "
                "number of trials at a time follows the cluster; remove both"
            )
        inline = self.cluster.backend == "inline"
        if inline and self.sweep.params and (self.sweep.slots or 1) > 1:
            raise ConfigError(
                f"sweep.slots={self.sweep.slots} with cluster.backend=inline: this process runs "
                "one trial at a time; set sweep.slots=1, or cluster.backend=ray for more"
            )

    def _check_execution(self) -> None:
        """Check how the model is executed: `compile` and `recompute`."""
        if isinstance(self.compile, Mapping):
            for key in self.compile:
                check_choice("compile: a setting", key, COMPILE_SETTINGS)
        elif not isinstance(self.compile, bool):
            raise ConfigError(
                f"compile={self.compile}: it must be true, false, or a mapping of arguments of "
                "torch.compile, such as {backend: inductor}"
            )
        for key in ("sync_batchnorm", "recompute"):
            if self.compile and getattr(self, key):
                raise ConfigError(
                    f"compile={self.compile} with {key}={getattr(self, key)}: torch.compile does "
                    f"not support it; set one of them to its default"
                )
        if self.recompute and self.sync_batchnorm:
            raise ConfigError(
                f"recompute={self.recompute} with sync_batchnorm=true: the statistics of batch "
                "norm would be exchanged again in the backward pass; set recompute=[]"
            )

    def _check_local_steps(self) -> None:
        """Check what cannot be combined with weights that differ between two averages."""
        for key, is_used, reason, advice in (
            ("precision=fp16", self.precision == "fp16", "the workers would scale their losses "
             "differently", "precision=bf16"),
            ("sync_batchnorm=true", self.sync_batchnorm, "it exchanges statistics in each step",
             "sync_batchnorm=false"),
            ("cluster.min_workers or cluster.replay", self.cluster.is_elastic, "the weights of a "
             "worker that continues are its own, not those of all", "a fixed number of workers"),
        ):  # fmt: skip
            if is_used:
                raise ConfigError(
                    f"allreduce.local_steps={self.allreduce.local_steps} with {key}: {reason}; "
                    f"set allreduce.local_steps=1, or use {advice}"
                )

    @property
    def batch_size(self) -> int:
        """Samples per optimizer step, over all workers."""
        return int(self.data["batch_size"])


def _enabled(phases: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The phases that are not left out. Raises ConfigError for an `enabled` that is not a bool."""
    found = {}
    for name, settings in phases.items():
        wanted = settings.get("enabled", True)
        if not isinstance(wanted, bool):
            raise ConfigError(f"phases.{name}.enabled={wanted}: it must be true or false")
        if wanted:
            found[name] = {key: value for key, value in settings.items() if key != "enabled"}
    return found
