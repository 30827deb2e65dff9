"""The functions of the library: run, resume, compose, sweep, load."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from trainer import artifact
from trainer.cluster import WorkerGroup
from trainer.compress.coding import Coder
from trainer.compress.rewrite import restore
from trainer.config import Config, SweepConfig, to_dataclass
from trainer.config.compose import compose_config
from trainer.config.renamed import rename_keys
from trainer.config.resumed import check_code
from trainer.driver import drive
from trainer.driver import resume as resume_run
from trainer.errors import ConfigError, LimitsMissed, RunError, first_line
from trainer.experiment import (
    Experiment,
    describe_cluster,
    describe_object,
    describe_parts,
    describe_section,
)
from trainer.library.objects import dump_objects, load_objects
from trainer.library.result import Result, SweepResult
from trainer.models.wrappers import unwrapped
from trainer.phases import StructuralPhase, StructuredPrune
from trainer.phases.structure import apply_changes, class_path, from_metadata
from trainer.report.terminal import Console
from trainer.signals import Signals
from trainer.store.directory import RunDirectory
from trainer.store.serialization import from_bytes

_OBJECTS = ("artifact", "data", "logger", "model", "phases", "task")  # that `resume` takes


def compose(*overrides: str, config_dir: str | Path | None = None) -> Experiment:
    """Compose an experiment from configuration files, as the command does.

        experiment = trainer.compose("smoke", "seed=1", "cluster=inline")

    Args:
        overrides: The name of an experiment, and Hydra overrides.
        config_dir: Folder with your own configuration files.

    Raises:
        ConfigError: A name, key or value is wrong.
    """
    written = [
        override if "=" in override or override.startswith("~") else f"+experiment={override}"
        for override in overrides
    ]
    composed = compose_config(written, None if config_dir is None else str(config_dir))
    return Experiment.from_config(composed.plain())


def run(
    experiment: Experiment | None = None,
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> Result:
    """Run an experiment from start to end.

        result = trainer.run(
            model=LeNet5(),
            data=trainer.data.mnist(),
            phases=[Train(epochs=2), Prune(0.9), Retrain(epochs=1), Share(bits=5)],
            workers=2,
            artifact=True,
            out="runs/first",
        )

    Args:
        experiment: The experiment; None: it is made of `settings`.
        out: The run directory; if it exists, a number is appended. By default
            outputs/NAME/DATE_TIME.
        progress: Whether to print the progress.
        settings: Arguments of `Experiment`: model, data, phases, workers, precision, ...

    Returns:
        The result: model, test metrics, model file, and summary.

    Raises:
        ConfigError: The experiment is wrong, and nothing was started.
        RunError: The run failed. Its folder holds the log, and the run can be resumed.
        LimitsMissed: The run is complete, but its result misses a limit; `result` is its result.
        Interrupted: Ctrl-C (interrupting the kernel of a notebook) stopped the run, which can be
            resumed. It is a KeyboardInterrupt.
    """
    if experiment is None:
        experiment = Experiment(**settings)
    else:
        check_experiment(experiment, settings)
    signals = Signals()
    with signals.installed():
        return execute(experiment, out, progress, signals, None)


def check_experiment(given: object, settings: Mapping[str, Any] | None = None) -> None:
    """Refuse what is no experiment, or settings beside one. Raises ConfigError."""
    if not isinstance(given, Experiment):
        raise ConfigError(
            f"experiment is a {type(given).__name__}: pass a trainer.Experiment, or to run also "
            "its settings by name: model=..., data=..., phases=..."
        )
    if settings:
        raise ConfigError(f"pass an experiment or its settings, not both: {', '.join(settings)}")


def execute(
    experiment: Experiment,
    out: str | Path | None,
    progress: bool,
    signals: Signals,
    group: WorkerGroup | None,
) -> Result:
    """Run an experiment, on warm workers if a group is given."""
    folder = Path(out) if out is not None else default_folder(experiment.name)
    console = Console() if progress else Console.quiet()
    content, problem = dump_objects(experiment.objects)
    if problem:
        console.say(problem)
    try:
        directory = drive(
            experiment.config,
            lambda: experiment,
            folder,
            signals,
            group=group,
            console=console,
            objects=content,
        )
    except LimitsMissed as error:
        error.result = Result(error.folder, experiment)
        raise
    return Result(directory.path, experiment)


def resume(
    folder: str | Path,
    *,
    workers: int | None = None,
    cluster: str | Mapping[str, Any] | None = None,
    checkpoint: Mapping[str, Any] | None = None,
    limits: Mapping[str, Any] | None = None,
    cost: Mapping[str, Any] | None = None,
    progress: bool = True,
    **objects: Any,
) -> Result:
    """Resume a run where it stopped, whether it was started from Python or by the command.

    With the same number of workers, an interrupted run ends with the same weights, bit for bit, as
    one that was not interrupted. A finished run is not run again.

    A run directory is code: the functions that its config.yaml names are called, and its
    objects.pkl is unpickled. Only resume runs that you trust. Modules in the run directory itself
    and folders that its configuration names are not imported.

    Args:
        folder: The run directory.
        workers: Another number of workers.
        cluster: Other settings of the section `cluster`; or "inline" or "local", with its settings.
        checkpoint: Other settings of the section `checkpoint`.
        limits: Other settings of the section `limits`.
        cost: Other settings of the section `cost`.
        progress: Whether to print the progress.
        objects: `model`, `data`, `task`, `phases`, `logger` or `artifact` as passed to `run`, if
            they could not be stored in the run directory.

    Returns:
        The result.

    Raises:
        ConfigError: There is no run in the folder, or a setting is wrong.
        RunError, LimitsMissed, Interrupted: As `run`.
    """
    directory = RunDirectory(Path(folder).absolute())
    plain = rename_keys(directory.read_config())
    changes = {
        "cluster": describe_cluster(cluster, workers),
        "checkpoint": describe_section("checkpoint", checkpoint),
        "limits": describe_section("limits", limits),
        "cost": describe_section("cost", cost),
    }
    if unknown := sorted(set(objects) - set(_OBJECTS)):
        raise ConfigError(
            f"{unknown[0]}: resume takes no such argument; objects are {', '.join(_OBJECTS)}"
        )
    check_code(plain, directory.path, changes["cluster"])
    for section, values in changes.items():
        plain[section] = {**plain.get(section, {}), **values}
    found = load_objects(directory.read_objects())
    describe_parts(found, **objects)
    config = to_dataclass(Config, plain)
    experiment = Experiment.from_config(config, found)
    signals = Signals()
    with signals.installed():
        console = Console() if progress else Console.quiet()
        try:
            resume_run(config, lambda: experiment, directory.path, signals, console=console)
        except LimitsMissed as error:
            error.result = Result(error.folder, experiment)
            raise
    return Result(directory.path, experiment)


def sweep(
    experiment: Experiment,
    params: Mapping[str, Any],
    *,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> SweepResult:
    """Search settings of an experiment with many trials, several at a time.

        trainer.sweep(
            trainer.compose("lenet300"),
            {"optimizer.lr": FloatDistribution(1e-3, 1e-1, log=True), "seed": [0, 1, 2]},
            trials=20,
        )

    The same call with the same `out` continues a sweep that was interrupted.

    Args:
        experiment: The experiment; settings that are not searched keep its values.
        params: Dotted keys of settings and their ranges. A range is a list of values, one of
            `optuna.distributions`, or a text as on the command line: "choice(3,5)", "range(1,5)",
            "interval(0.1,0.5)", "tag(log, interval(1e-4,1e-1))". Settings of a model or data that
            were passed as objects cannot be searched; pass the class instead.
        out: The sweep's folder. By default outputs/NAME/sweep.
        progress: Whether to print the progress.
        options: Other settings of the section `sweep`: trials, seconds, objectives, constraints,
            sampler, pruner (a name, or an object of a class of your own), slots, refit, ...

    Returns:
        The result: best trials, all trials, and summary.

    Raises:
        ConfigError: A key or a range is wrong, and nothing was started.
        RunError: No trial was completed.
        Interrupted: The sweep was interrupted; the same call continues it.
    """
    from trainer.sweeps.driver import run_sweep  # imports Optuna
    from trainer.sweeps.ranges import range_text

    check_experiment(experiment)
    settings = experiment.settings()
    objects = dict(experiment.objects)
    for key in ("sampler", "pruner"):
        if not isinstance(options.get(key, ""), str):
            options[key] = describe_object(f"sweep.{key}", options[key], objects)
    settings["sweep"] = {
        **dataclasses.asdict(SweepConfig(objectives={"accuracy": "maximize"})),
        **options,
        "params": {key: range_text(key, given) for key, given in params.items()},
    }
    config = to_dataclass(Config, settings)
    folder = Path(out) if out is not None else Path("outputs") / config.name / config.sweep.name
    plain = dataclasses.asdict(config)
    for name, phase in plain["phases"].items():
        if f"phases.{name}.enabled" in params:
            phase["enabled"] = True  # all that an experiment has are
    tree = OmegaConf.create(plain)
    signals = Signals()
    with signals.installed():
        best = run_sweep(config, tree, folder, None, signals, objects, progress)
    refit = None
    if best is not None:
        refit = _refit(Experiment.from_config(best, experiment.objects), folder / "best", progress)
    return SweepResult(folder, refit)


def _refit(experiment: Experiment, folder: Path, progress: bool) -> Result:
    try:
        return run(experiment, out=folder, progress=progress)
    except ConfigError as error:  # no exit code 2 after a whole search
        raise RunError(f"the best trial cannot be run in full: {error}") from error


def load(
    path: str | Path,
    model: nn.Module,
    *,
    phases: Sequence[type[StructuralPhase]] = (),
    max_bytes: int | None = None,
    coder: Coder | None = None,
) -> nn.Module:
    """Load a model that was trained or compressed here.

        model = trainer.load("runs/first/model.dcz", LeNet5())

    Args:
        path: A model.dcz or model.safetensors, or the folder of a run.
        model: A model of the same class and settings, with any weights. It is changed in place:
            the structure that quantization or pruning gave it is restored, too, and wrappers of
            torch.compile and `nn.DataParallel` are removed.
        phases: Classes of your own phases that changed the structure. Code named in a file is never
            imported.
        max_bytes: Largest size of the decoded tensors; see `trainer.artifact.load`.
        coder: An object of your own coder's class, if one coded the file (docs/own-coder.md).

    Returns:
        The model in evaluation mode.

    Raises:
        ConfigError: The file's model was changed by a phase that is not in `phases`, or `model` is
            not a module.
        trainer.artifact.ArtifactError: The file is damaged, or holds no model.
        OSError: The file cannot be read.
        RuntimeError: The weights do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"model is a {type(model).__name__}: pass a module, such as LeNet5(), not its class"
        )
    path = Path(path)
    if path.is_dir():
        names = [name for name in ("model.dcz", "model.safetensors") if (path / name).exists()]
        if not names:
            raise FileNotFoundError(f"{path}: there is neither model.dcz nor model.safetensors")
        path = path / names[0]
    content = path.read_bytes()
    metadata: Mapping[str, Any]
    if path.suffix == ".dcz":
        weights, metadata = artifact.loads(content, max_bytes, coder), artifact.read_about(content)
    else:
        try:
            weights, metadata = from_bytes(content)
        except Exception as error:  # safetensors and struct have errors of their own
            raise artifact.ArtifactError(
                f"{path}: neither a .dcz nor a .safetensors file, or damaged: {first_line(error)}"
            ) from error
    known: tuple[type[StructuralPhase], ...] = (StructuredPrune, *phases)
    kinds = {class_path(kind): kind for kind in known}
    apply_changes(unwrapped(model), from_metadata(metadata), kinds)
    return restore(model, weights).eval()


def default_folder(name: str) -> Path:
    """The default run directory, as for the command."""
    return Path("outputs") / name / time.strftime("%Y-%m-%d_%H-%M-%S")
