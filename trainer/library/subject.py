"""The model and samples that a command is given: by a run directory, model file or experiment."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import artifact, models
from trainer.compress.rewrite import restore
from trainer.config.compose import compose_config
from trainer.config.renamed import rename_keys
from trainer.engine.world import World
from trainer.errors import ConfigError, first_line
from trainer.experiment import Experiment
from trainer.hardware.costs import random_samples
from trainer.hardware.figures import Evidence
from trainer.library.objects import load_objects
from trainer.models.copying import copy_model
from trainer.phases import Phase, Quantize, RoundPhase, StructuralPhase, StructuredPrune
from trainer.phases.structure import apply_changes, class_path, from_metadata
from trainer.store.directory import RunDirectory
from trainer.store.serialization import from_bytes

# Models for files without a run or an experiment, and the shapes of their samples.
_MODELS: Mapping[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "trainer.models.LeNet300": (models.LeNet300, (1, 28, 28)),
    "trainer.models.LeNet5": (models.LeNet5, (1, 28, 28)),
    "trainer.models.AlexNet": (models.AlexNet, (3, 224, 224)),
    "trainer.models.VGG16": (models.VGG16, (3, 224, 224)),
    "trainer.models.resnet18": (models.resnet18, (3, 224, 224)),
    "trainer.models.resnet50": (models.resnet50, (3, 224, 224)),
    "trainer.models.ResNetCifar": (models.ResNetCifar, (3, 32, 32)),
    "trainer.models.LSTMLanguageModel": (models.LSTMLanguageModel, (64,)),
}


@dataclass(frozen=True)
class Subject:
    """A model, and samples that it can compute."""

    model: nn.Module
    dense: nn.Module  # the same without quantizers
    samples: Tensor
    file: bytes | None
    evidence: Evidence = "measured"
    notes: tuple[str, ...] = ()
    run: tuple[RunDirectory, Experiment] | None = None  # from which the model was loaded


def find_subject(
    what: str, overrides: list[str], config_dir: str | None = None, count: int = 8
) -> Subject:
    """Load a run directory, a model file or an experiment.

    Args:
        what: A path, or the name of an experiment.
        overrides: Settings of the experiment, or its name and settings after a file.
        config_dir: Folder of the user's own configuration files.
        count: Samples to load.

    Raises:
        ConfigError: There is nothing of that name, or the model does not fit the file.
        trainer.artifact.ArtifactError: The file is damaged.
        OSError: A file cannot be read.
    """
    path = Path(what)
    if path.is_dir():
        _refuse(overrides, "a run has its settings")
        return _of_run(path, None, count)
    if path.is_file():
        if overrides:
            return _of_file(path, _compose(overrides, config_dir), count)
        if (path.parent / "config.yaml").is_file():
            return _of_run(path.parent, path, count)
        return _of_file(path, None, count)
    if path.suffix in (".dcz", ".safetensors") or os.sep in what:
        raise ConfigError(f"{what}: there is no such file or run directory")
    return _of_experiment(_compose([what, *overrides], config_dir), count)


def _refuse(overrides: list[str], reason: str) -> None:
    if overrides:
        raise ConfigError(f"{overrides[0]}: {reason}; leave it out")


def _compose(overrides: Sequence[str], config_dir: str | None) -> Experiment:
    name, *rest = overrides
    if "=" in name and not name.startswith("+experiment="):
        raise ConfigError(f"{name}: name an experiment first")
    first = name if "=" in name else f"+experiment={name}"
    return Experiment.from_config(compose_config([first, *rest], config_dir).plain())


def _of_run(folder: Path, file: Path | None, count: int) -> Subject:
    """A finished run, or one of its model files."""
    directory = RunDirectory(folder)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: no run directory, since it has no config.yaml")
    names = [folder / name for name in ("model.dcz", "model.safetensors")]
    found = file or next((path for path in names if path.is_file()), None)
    if found is None:
        raise ConfigError(f"{folder}: the run has not finished: it has no model.dcz yet")
    objects = load_objects(directory.read_objects())
    experiment = Experiment.from_config(rename_keys(directory.read_config()), objects)
    return replace(_of_file(found, experiment, count), run=(directory, experiment))


def _of_file(path: Path, experiment: Experiment | None, count: int) -> Subject:
    """A model file, with the model and the data of an experiment if there is one."""
    content = path.read_bytes()
    coded = path.suffix != ".safetensors"
    if coded:
        weights, metadata = artifact.loads(content), artifact.read_about(content)
    else:
        try:
            weights, metadata = from_bytes(content)
        except Exception as error:  # safetensors and struct have errors of their own
            raise artifact.ArtifactError(
                f"no .safetensors file, or damaged: {first_line(error)}"
            ) from error
    file = content if coded else None
    if experiment is None:
        return _without_experiment(path, weights, metadata, file, count)
    changes = from_metadata(metadata)
    try:
        model, dense = experiment.load_model(weights, changes), experiment.build_model()
    except RuntimeError as error:
        raise ConfigError(f"{path}: not of this experiment's model: {first_line(error)}") from error
    experiment.apply_changes(dense, changes)
    return Subject(model, dense, _validation_samples(experiment, count), file)


def _without_experiment(
    path: Path,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    file: bytes | None,
    count: int,
) -> Subject:
    """A file whose header names a model of `trainer.models`. Other code is not imported."""
    described = metadata.get("model")
    settings = dict(described) if isinstance(described, Mapping) else {}
    target = str(settings.pop("_target_", ""))
    changes = from_metadata(metadata)
    kinds = {class_path(StructuredPrune): StructuredPrune}
    if target not in _MODELS or any(change.phase not in kinds for change in changes):
        raise ConfigError(
            f"{path}: its model and data are not known; give the run directory, or "
            "the experiment after the file"
        )
    build, shape = _MODELS[target]
    try:
        model, dense = build(**settings), build(**settings)
        for each in (model, dense):
            apply_changes(each, changes, kinds)
        restore(model, weights)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: not of {target}: {first_line(error)}") from error
    tokens = settings.get("vocabulary", 96) if "LSTM" in target else None
    samples = random_samples(shape, tokens, count)
    note = f"random samples of shape {list(shape)}: densities of activations are assumptions"
    return Subject(model, dense, samples, file, "assumed", (note,))


def _of_experiment(experiment: Experiment, count: int) -> Subject:
    """The model of an experiment after its phases, without training."""
    model, dense = experiment.build_model(), experiment.build_model()
    samples = _validation_samples(experiment, count)
    world = World.single(torch.device("cpu"))
    notes = ["weights are not trained: sizes and densities are assumptions"]
    for name, phase in experiment.phases.items():
        if isinstance(phase, RoundPhase) or phase.searches:
            notes.append(f"phase {name} is left out: its result depends on training")
        else:
            _apply(phase, model, dense, world, samples)
    content = None
    if experiment.config.artifact.make:
        config = experiment.config.artifact
        content = artifact.encode(model.state_dict(), config.dtype, config.coder)
    return Subject(model, dense, samples, content, "assumed", tuple(notes))


def _apply(phase: Phase, model: nn.Module, dense: nn.Module, world: World, samples: Tensor) -> None:
    """Go through a phase without training."""
    if phase.samples:
        phase.observe(model, world, [samples])
    if isinstance(phase, StructuralPhase):
        change = phase.plan_change(model, world)
        for each in (model, dense):
            phase.apply_change(each, change)
    phase.enter(model, world)
    with torch.no_grad():
        model.train()(samples)  # ranges of activations
    phase.after_step(model, world, 1, 1)
    phase.leave(model)


def quantized_copy(model: nn.Module, samples: Tensor) -> nn.Module:
    """The model with untrained 8-bit quantizers: as fast as with trained ones, less accurate."""
    made = copy_model(model)
    _apply(Quantize(), made, made, World.single(torch.device("cpu")), samples)
    return made.eval()


def _validation_samples(experiment: Experiment, count: int) -> Tensor:
    """The first samples of the validation data; from the beginning again if there are too few."""
    split = experiment.build_data().validation
    indices = torch.arange(count) % len(split)
    ((inputs, _),) = split.batches([indices], None)
    if not isinstance(inputs, Tensor):
        raise ConfigError("the cost on hardware is only known for models with one input tensor")
    return inputs
