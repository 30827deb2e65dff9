"""The class Experiment: typed settings, and the objects that they describe."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.compress.coding import Coder
from trainer.compress.rewrite import restore
from trainer.config import (
    AllReduceConfig,
    ArtifactConfig,
    CheckpointConfig,
    ClusterConfig,
    Config,
    CostConfig,
    ExportConfig,
    LimitsConfig,
    to_dataclass,
)
from trainer.config.compose import choose
from trainer.config.instantiate import OBJECT, Factory
from trainer.config.renamed import rename_keys
from trainer.data.datasets import preserved_generators, seed_generators
from trainer.data.hashing import mix
from trainer.data.sources import as_splits
from trainer.data.split import Splits
from trainer.data.streams import stream_of
from trainer.engine.lossy.make import check_compression
from trainer.engine.optim import OptimizerSpec, parse_optimizer
from trainer.engine.runtime import Runtime
from trainer.engine.world import World
from trainer.errors import ConfigError, first_line
from trainer.experiment.describe import (
    describe_cluster,
    describe_object,
    describe_parts,
    describe_section,
)
from trainer.experiment.optimizer import check_optimizer
from trainer.experiment.phases import (
    Stage,
    build_phases,
    check_averages,
    check_distillation,
    check_limits,
    check_max_drops,
    check_mixing,
    check_order,
    check_schedules,
    stages_of,
)
from trainer.models.copying import copy_model
from trainer.models.wrappers import is_compiled, unwrapped, wrapped_in
from trainer.phases import Phase, StructuralPhase
from trainer.phases.structure import (
    StructureChange,
    apply_changes,
    class_path,
)
from trainer.tasks import Task

DEFAULT_OPTIMIZER = {
    "_target_": "torch.optim.SGD",
    "lr": 0.02,
    "momentum": 0.9,
    "weight_decay": 0.0005,
    "nesterov": True,
    "groups": {},
}
"""The optimizer of experiments that name none; the same as conf/optimizer/sgd.yaml."""


class Experiment:
    """A model, data, and the phases that train and compress the model.

        experiment = Experiment(
            model=LeNet5(),
            data=trainer.data.mnist(),
            phases=[Train(epochs=2), Prune(sparsity=0.9), Retrain(epochs=1)],
            workers=2,
        )
        result = trainer.run(experiment)

    Args:
        model: An `nn.Module`, whose weights are the initial weights; a callable that returns one,
            such as a class or `functools.partial(ConvNet, depth=3)`, called under the seed; or a
            mapping with a `_target_`. Of `torch.compile(module)` and `nn.DataParallel(module)`,
            the module in it is used.
        data: Splits, Datasets or tensors (see `trainer.data.as_splits`); a callable that returns
            `Splits`; or a mapping with a `_target_`.
        phases: Phases in order, as a sequence or as a mapping by name.
        task: What is minimized and measured: a name, such as "regression"; an object of a class of
            `trainer.tasks`, such as `trainer.tasks.Regression(loss="huber")`, or of your own
            (docs/own-task.md); or a mapping with a `_target_`. By default "classification".
        optimizer: A name, such as "adamw"; a class or `functools.partial` of one, such as
            `partial(torch.optim.AdamW, lr=1e-3)`; or a mapping with a `_target_`, which may have
            `groups` (docs/training.md). By default "sgd", with a learning rate of 0.02, momentum
            0.9, Nesterov, and weight decay 0.0005.
        lr: Peak learning rate of phases that set none; overrides that of `optimizer`.
        name: Title, and default folder under outputs/.
        seed: Seeds initial weights, order of the samples, augmentation and dropout.
        batch_size: Samples per optimizer step, over all workers.
        precision: "fp32", "bf16" or "fp16".
        channels_last: Memory format of convolutional models.
        sync_batchnorm: Whether batch norm covers the samples of all workers, or each worker's own.
        compile: Whether training uses torch.compile, or a mapping of its arguments. It is True for
            a `model` that was compiled.
        recompute: Patterns of modules with gradient checkpointing, such as ["layer*"].
        profile: Whether to measure the parts of each step, and to write traces of some steps.
        init_from: File with initial weights (.safetensors, .pt, .bin or .dcz), or a folder that
            save_pretrained wrote.
        init_skip: Patterns of names in the model that are not loaded, such as ["head.*"].
        init_strict: Whether all other names and shapes must be those of the model; False: what
            fits is loaded.
        workers: Number of data-parallel workers; shorthand for `cluster`.
        cluster: "inline" (this process is the only worker) or "local" (Ray workers); or settings
            of the section `cluster`, as a dataclass of `trainer.config` or a mapping; likewise the
            next five, without the names.
        allreduce: How gradients are averaged.
        checkpoint: When the state is stored.
        export: Whether to write model.onnx.
        limits: What the result must reach.
        cost: What energy costs, and the power of what no counter measures.
        artifact: Whether to write model.dcz, or the settings with which it is written, in which
            `coder` may be an object of a class of your own (docs/own-coder.md).
        logger: Names, such as ["tensorboard", "csv"]; or sinks by name: mappings with a
            `_target_`, or objects that follow `trainer.report.Sink`.

    Names are those that `task=NAME`, `optimizer=NAME`, `cluster=NAME` and `logger=[NAME]` select on
    the command line.

    Raises:
        ConfigError: A setting is unknown or not allowed, or the phases do not fit together.

    Attributes:
        config: All settings, typed.
        model: Factory of the model.
        data: Factory of the data.
        task: The task.
        optimizer: The optimizer class and its settings.
        phases: The phases by name, in order.
    """

    def __init__(
        self,
        *,
        model: nn.Module | Callable[..., nn.Module] | Mapping[str, Any],
        data: Any,
        phases: Sequence[Phase] | Mapping[str, Phase],
        task: str | Task | Callable[..., Task] | Mapping[str, Any] | None = None,
        optimizer: str | Callable[..., torch.optim.Optimizer] | Mapping[str, Any] | None = None,
        lr: float | None = None,
        name: str = "experiment",
        seed: int = 0,
        batch_size: int = 64,
        precision: str = "fp32",
        channels_last: bool = False,
        sync_batchnorm: bool = False,
        compile: bool | Mapping[str, Any] = False,
        recompute: Sequence[str] = (),
        profile: bool = False,
        init_from: str | Path | None = None,
        init_skip: Sequence[str] = (),
        init_strict: bool = True,
        workers: int | None = None,
        cluster: str | ClusterConfig | Mapping[str, Any] | None = None,
        allreduce: AllReduceConfig | Mapping[str, Any] | None = None,
        checkpoint: CheckpointConfig | Mapping[str, Any] | None = None,
        artifact: bool | ArtifactConfig | Mapping[str, Any] = False,
        export: ExportConfig | Mapping[str, Any] | None = None,
        limits: LimitsConfig | Mapping[str, Any] | None = None,
        cost: CostConfig | Mapping[str, Any] | None = None,
        logger: str | Sequence[str] | Mapping[str, Any] | None = None,
    ) -> None:
        objects: dict[str, Any] = {}
        if not (isinstance(model, nn.Module | Mapping) or callable(model)):
            raise ConfigError(
                f"model is a {type(model).__name__}: pass an nn.Module, a class or function that "
                "returns one, or a mapping with a _target_"
            )
        if data is None:
            raise ConfigError("data is None: pass Splits, Datasets, tensors, or a mapping")
        compile = compile or is_compiled(model)
        parts = describe_parts(
            objects,
            model=model,
            data=data,
            task=task,
            phases=phases,
            logger=logger,
            artifact=artifact,
        )
        if isinstance(optimizer, str):
            chosen = choose("optimizer", optimizer)
        else:
            chosen = describe_object("optimizer", optimizer or DEFAULT_OPTIMIZER, objects)
        if OBJECT in chosen:
            raise ConfigError("optimizer: pass its class, not an object: it is made for each phase")
        settings = {
            **parts,
            "name": name,
            "data": {**parts["data"], "batch_size": batch_size},
            "optimizer": chosen if lr is None else {**chosen, "lr": lr},
            "init_from": None if init_from is None else str(init_from),
            "init_skip": _patterns(init_skip),
            "init_strict": init_strict,
            "seed": seed,
            "precision": precision,
            "channels_last": channels_last,
            "sync_batchnorm": sync_batchnorm,
            "compile": dict(compile) if isinstance(compile, Mapping) else compile,
            "recompute": _patterns(recompute),
            "profile": profile,
            "cluster": describe_cluster(cluster, workers),
            "allreduce": describe_section("allreduce", allreduce),
            "checkpoint": describe_section("checkpoint", checkpoint),
            "export": describe_section("export", export),
            "limits": describe_section("limits", limits),
            "cost": describe_section("cost", cost),
        }
        self._build(to_dataclass(Config, settings), objects)

    @classmethod
    def from_config(
        cls, config: Config | Mapping[str, Any], objects: Mapping[str, Any] | None = None
    ) -> "Experiment":
        """Build an experiment from its settings.

        Args:
            config: Typed, or plain as in config.yaml.
            objects: Python objects that the settings refer to by `_object_`, and classes by dotted
                path that cannot be imported.

        Raises:
            ConfigError: As the constructor.
        """
        experiment = cls.__new__(cls)
        if not isinstance(config, Config):
            config = to_dataclass(Config, rename_keys(config))
        experiment._build(config, dict(objects or {}))
        return experiment

    def _build(self, config: Config, objects: dict[str, Any]) -> None:
        self.config = config
        self.objects = objects
        self.loggers: dict[str, Factory[Any]] = {
            name: Factory(f"logger.{name}", settings, object, objects)
            for name, settings in config.logger.items()
        }
        objects = _without_sinks(objects)
        self.model: Factory[nn.Module] = Factory(
            "model", config.model, nn.Module, objects, copy_model
        )
        settings = {key: value for key, value in config.data.items() if key != "batch_size"}
        self.data: Factory[Splits] = Factory("data", settings, Splits, objects)
        task: Factory[Task] = Factory("task", config.task, Task, objects)
        self.task: Task = task.build()
        self.optimizer: OptimizerSpec = parse_optimizer(config.optimizer, objects)
        check_optimizer(self.optimizer)
        self.phases: dict[str, Phase] = build_phases(config.phases, config.limits.drop, objects)
        self.coder: str | Coder = config.artifact.coder
        if not isinstance(self.coder, str):
            factory = Factory("artifact.coder", self.coder, object, objects)
            self.coder = cast(Coder, factory.build())
        check_compression(config.allreduce)
        check_order(self.phases)
        check_schedules(self.phases, self.optimizer.lr)
        check_mixing(self.phases, self.task)
        check_averages(self.phases, config.allreduce.local_steps)
        check_distillation(self.phases, self.task, self.has_initial_weights)
        check_limits(config.limits, self.task, self.has_dense_model)
        check_max_drops(self.phases, config.limits)

    def settings(self) -> dict[str, Any]:
        """All settings as plain values: the content of config.yaml."""
        return dataclasses.asdict(self.config)

    def for_workers(self) -> "Experiment":
        """A copy without the sinks, which only the driver uses and which may hold files."""
        other = copy.copy(self)
        other.objects, other.loggers = _without_sinks(self.objects), {}
        return other

    def with_cluster(self, cluster: ClusterConfig) -> "Experiment":
        """The same experiment on other workers."""
        config = dataclasses.replace(self.config, cluster=cluster)
        return Experiment.from_config(config, self.objects)

    @property
    def name(self) -> str:
        """Title of the experiment."""
        return self.config.name

    @property
    def stages(self) -> list[Stage]:
        """The stages that the phases lead through; the first one is the dense model."""
        return stages_of(self.phases)

    @property
    def has_initial_weights(self) -> bool:
        """Whether the initial weights are given: by `init_from`, or by a model object."""
        return self.config.init_from is not None or self.model.is_object

    @property
    def has_dense_model(self) -> bool:
        """Whether there is a dense model to compare with: a trained one, or given weights."""
        return self.stages[0].phase >= 0 or self.has_initial_weights

    def dense_phase_needed(self, start: int) -> int | None:
        """The phase whose weights, the dense model's, phases from index `start` on need.

        Returns:
            Index of the phase; -1 for the initial weights. None if no phase needs the dense model,
            or if the run starts from it anyway.
        """
        dense = self.stages[0].phase
        if dense >= start - 1:
            return None
        remaining = list(self.phases.values())[start:]
        return dense if any(phase.needs_dense_model for phase in remaining) else None

    def build_model(self) -> nn.Module:
        """Build the model with its initial weights, drawn from torch's global random state.

        Of a model that was given, it is a copy.

        Raises:
            ConfigError: It cannot be built, or is of a kind that cannot be trained.
        """
        model = self.model.build()
        if self.model.is_object:
            model = unwrapped(model)
        for name, module in model.named_modules():
            if wrapped_in(module) is not None:
                raise ConfigError(
                    f"model{name and '.'}{name} is a wrapper, {type(module).__name__}, whose name "
                    "would be in the names of the weights; return the module in it: the workers "
                    "share the batches, and compile=true compiles the model"
                )
            if isinstance(module, torch.jit.ScriptModule):
                raise ConfigError(
                    f"model{name and '.'}{name}: modules of torch.jit cannot be changed or saved "
                    "as state_dicts of their own; pass the module that it was made from"
                )
        if self.model.is_object:
            for name, given in self.model.given.named_parameters():
                if given._backward_hooks or given._post_accumulate_grad_hooks:
                    raise ConfigError(
                        f"model: {name} has a hook (register_hook), which the copies of the model "
                        "on the workers would not have; freeze parameters with fit.freeze, and "
                        "change gradients in a module of your own"
                    )
        if torch.get_default_device().type != "meta":
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                if tensor.is_meta:
                    raise ConfigError(
                        f"model: {name} is on the meta device, so that it has no values; build the "
                        "model on the CPU, or pass the class or function that builds it"
                    )
        return model

    def build_data(self) -> Splits:
        """Build the three splits. They are the same whenever and wherever they are built.

        Code that draws from the global random generators of the CPU, such as `random_split`,
        draws by the experiment's seed.

        Raises:
            ConfigError: The settings or the data are wrong, or a split is empty.
        """
        seed = self.config.seed
        with preserved_generators():
            seed_generators(mix(seed))
            if self.data.is_object:
                try:
                    splits = as_splits(self.objects[self.data.settings[OBJECT]], seed)
                except ValueError as error:
                    raise ConfigError(str(error)) from error
            else:
                splits = self.data.build(seed=seed)
        if (stream := stream_of(splits.train)) is not None:
            try:
                stream.set_batch_size(self.config.batch_size)
            except ValueError as error:
                raise ConfigError(str(error)) from error
        for name, split in vars(splits).items():
            # Counting a stream may take long; if it is empty, its first sample cannot be read.
            if stream_of(split) is None and len(split) == 0:
                raise ConfigError(f"data: the {name} split is empty; give it at least one sample")
        return splits

    def build_runtime(self, world: World) -> Runtime:
        """Build the objects that all phases share on a worker."""
        return Runtime(
            world=world,
            precision=self.config.precision,
            allreduce=self.config.allreduce,
            optimizer=self.optimizer,
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            channels_last=self.config.channels_last,
            sync_batchnorm=self.config.sync_batchnorm,
            compile=self.config.compile,
            recompute=self.config.recompute,
            task=copy.deepcopy(self.task),  # its tensors move to the device of the worker
        )

    def build_loggers(self, folder: Path, name: str, group: str | None = None) -> list[Any]:
        """Make the sinks that `logger` names; they follow `trainer.report.sinks.Sink`.

        Args:
            folder: The run directory.
            name: Title of the run.
            group: Name of the sweep that the run is a trial of.

        Raises:
            ConfigError: One of them cannot be opened; the others are closed.
        """
        context = {"folder": folder, "name": name, "settings": self.settings(), "group": group}
        opened: list[Any] = []
        try:
            for factory in self.loggers.values():
                # A given sink is used itself, since its owner may read from it what it received.
                opened.append(factory.given if factory.is_object else factory.build(**context))
        except Exception as error:
            for sink in opened:
                sink.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{factory.key}: {first_line(error)}") from error
        return opened

    @property
    def own_coder(self) -> Coder | None:
        """The coder that reading model.dcz needs; None: it is one of trainer's."""
        return None if isinstance(self.coder, str) else self.coder

    def load_model(
        self, weights: Mapping[str, Tensor], changes: Sequence[StructureChange] = ()
    ) -> nn.Module:
        """Build a fresh model and give it the structure and weights of a trained one.

        Args:
            weights: A state_dict, perhaps of a quantized model.
            changes: Structural changes made before the weights were stored.
        """
        model = self.build_model()
        self.apply_changes(model, changes)
        return restore(model, weights)

    def apply_changes(self, model: nn.Module, changes: Sequence[StructureChange]) -> None:
        """Make the structural changes of this experiment's phases on a fresh model, in place."""
        kinds = {
            class_path(type(phase)): type(phase)
            for phase in self.phases.values()
            if isinstance(phase, StructuralPhase)
        }
        apply_changes(model, changes, kinds)


def _patterns(given: str | Sequence[str]) -> list[str]:
    """Patterns as a list; a text is one pattern."""
    return [given] if isinstance(given, str) else [*given]


def _without_sinks(objects: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in objects.items() if not key.startswith("logger.")}
