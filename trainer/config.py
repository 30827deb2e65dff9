"""The typed schema of a run, and the checks that need nothing but the values.

`Config` mirrors conf/config.yaml. Checks that need a class (does a phase take this key, can this
model be built) live on the floor that knows the class; all of them run before anything starts and
raise `ConfigError`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from trainer.errors import ConfigError

T = TypeVar("T")

PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "cosine", "step")


def one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not in `allowed`. Raises ConfigError."""
    if value not in allowed:
        raise ConfigError(f"{key}={value}: it must be one of {', '.join(allowed)}")


def at_least(key: str, value: float | None, low: float, *, excluded: bool = False) -> None:
    """Refuse a number below `low` (or equal to it if `excluded`), NaN and infinity included.

    None passes: it means "not set". Raises ConfigError.
    """
    if value is None:
        return
    if not math.isfinite(value) or value < low or (excluded and value == low):
        raise ConfigError(f"{key}={value}: it must be {'above' if excluded else 'at least'} {low}")


def typed(schema: type[T], settings: Mapping[str, Any], where: str = "") -> T:
    """Build the dataclass `schema` from plain settings, every key and type checked.

    Args:
        schema: a dataclass; its `__post_init__` may check values.
        settings: what a configuration file says; nested mappings become nested dataclasses.
        where: dotted key of the settings, for messages.

    Raises:
        ConfigError: names the key, its value, and what is known or expected.
    """
    try:
        node = OmegaConf.structured(schema)
        _thaw(node)
        return cast(T, OmegaConf.to_object(OmegaConf.merge(node, dict(settings))))
    except OmegaConfBaseException as error:
        key = ".".join(part for part in (where, str(error.full_key or "")) if part)
        message = f"{key}: {str(error).splitlines()[0]}"
        if isinstance(error, ConfigKeyError) and is_dataclass(error.object_type):
            message += f"; known keys: {', '.join(f.name for f in fields(error.object_type))}"
        raise ConfigError(message) from error
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}" if where else str(error)) from error


def _thaw(node: DictConfig) -> None:
    """Let settings be merged into frozen dataclasses' nodes; what they make is frozen anyway."""
    OmegaConf.set_readonly(node, False)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and is_dataclass(OmegaConf.get_type(child)):
            _thaw(child)


@dataclass(frozen=True)
class FitConfig:
    """How a phase trains. `epochs: 0` means that there is nothing to train."""

    epochs: int = 0  # passes over the training data
    lr: float | None = None  # peak learning rate; null: optimizer.lr
    schedule: str = "cosine"  # after the warm-up: constant | cosine (to zero) | step
    warmup_epochs: float = 0.0  # linear rise from zero to the peak
    step_epochs: int = 10  # schedule=step: epochs between drops
    step_gamma: float = 0.1  # schedule=step: factor of each drop
    accumulate: int = 1  # micro-batches per optimizer step
    clip: float | None = None  # maximum L2 norm of the whole gradient; null: no clipping
    max_steps: int | None = None  # stop after so many optimizer steps; null: epochs decide

    def __post_init__(self) -> None:
        at_least("fit.epochs", self.epochs, 0)
        at_least("fit.lr", self.lr, 0, excluded=True)
        one_of("fit.schedule", self.schedule, SCHEDULES)
        at_least("fit.warmup_epochs", self.warmup_epochs, 0)
        at_least("fit.step_epochs", self.step_epochs, 1)
        at_least("fit.step_gamma", self.step_gamma, 0, excluded=True)
        at_least("fit.accumulate", self.accumulate, 1)
        at_least("fit.clip", self.clip, 0, excluded=True)
        at_least("fit.max_steps", self.max_steps, 1)


@dataclass(frozen=True)
class AllReduceConfig:
    """How gradients are averaged over the workers."""

    algorithm: str = "ring"  # ring (own, over point-to-point sends) | native (gloo, NCCL)
    wire: str = "fp32"  # type of the values that travel: fp32 | bf16 | fp16
    bucket_mb: float = 25.0  # MiB of gradients that are reduced together
    segment_kb: int = 1024  # KiB of a ring message that are in flight at a time

    def __post_init__(self) -> None:
        one_of("allreduce.algorithm", self.algorithm, ("ring", "native"))
        one_of("allreduce.wire", self.wire, PRECISIONS)
        at_least("allreduce.bucket_mb", self.bucket_mb, 0, excluded=True)
        at_least("allreduce.segment_kb", self.segment_kb, 1)


@dataclass(frozen=True)
class ClusterConfig:
    """Which processes train, and on what."""

    workers: int = 2  # data-parallel processes
    backend: str = "ray"  # ray | inline (this process; one worker; a debugger works)
    device: str = "auto"  # auto (cuda where every worker can have one) | cpu | cuda
    address: str | None = (
        None  # Ray cluster to join (host:port or auto); null: RAY_ADDRESS, else a private one
    )
    cpus_per_worker: float = 1.0  # CPUs that Ray reserves for a worker
    gpus_per_worker: float = (
        1.0  # GPUs that Ray reserves for a worker on device=cuda; may be a fraction
    )
    threads: int | None = None  # torch threads of a worker; null: cpus_per_worker, at least 1
    nice: int = 0  # niceness of the worker processes (Ray's own default is 15)
    start_timeout_s: float = 60.0  # seconds to wait until the cluster has room for all workers
    hang_timeout_s: float = 60.0  # seconds without a sign of life after which a collective gives up
    working_dir: str | None = (
        None  # folder of your code that a remote cluster's workers get; null: none
    )
    py_modules: list[str] = field(default_factory=list)  # more packages to send along

    def __post_init__(self) -> None:
        at_least("cluster.workers", self.workers, 1)
        one_of("cluster.backend", self.backend, ("ray", "inline"))
        one_of("cluster.device", self.device, ("auto", "cpu", "cuda"))
        at_least("cluster.cpus_per_worker", self.cpus_per_worker, 0, excluded=True)
        at_least("cluster.gpus_per_worker", self.gpus_per_worker, 0, excluded=True)
        at_least("cluster.threads", self.threads, 1)
        at_least("cluster.start_timeout_s", self.start_timeout_s, 0, excluded=True)
        at_least("cluster.hang_timeout_s", self.hang_timeout_s, 0, excluded=True)
        if self.address and self.address.startswith("ray://"):
            raise ConfigError(
                f"cluster.address={self.address}: Ray Client cannot stream results; run on a node "
                "of the cluster (ray job submit) and give host:port or auto"
            )
        if not 0 <= self.nice <= 19:
            raise ConfigError(f"cluster.nice={self.nice}: it must be between 0 and 19")
        if self.backend == "inline" and self.workers != 1:
            raise ConfigError(
                f"cluster.workers={self.workers} with cluster.backend=inline: this process is one "
                "worker; set cluster.workers=1, or cluster.backend=ray for more"
            )


@dataclass(frozen=True)
class Config:
    """One run. Nested mappings with a `_target_` stay plain: their class checks its own keys."""

    name: str  # folder under outputs/, and the title of the run
    model: dict[str, Any]
    data: dict[str, Any]
    optimizer: dict[str, Any]
    phases: dict[str, dict[str, Any]]
    seed: int = 0
    precision: str = "fp32"
    channels_last: bool = False
    allreduce: AllReduceConfig = field(default_factory=AllReduceConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\\0") or self.name in (".", ".."):
            raise ConfigError(f"name={self.name!r}: it must be usable as the name of a folder")
        at_least("seed", self.seed, 0)
        batch_size = self.data.get("batch_size")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"data.batch_size={batch_size}: it must be a whole number above 0")
        if batch_size < self.cluster.workers:
            raise ConfigError(
                f"data.batch_size={batch_size} with cluster.workers={self.cluster.workers}: the "
                "global batch is shared out, so it must hold at least one sample per worker"
            )
        one_of("precision", self.precision, PRECISIONS)
