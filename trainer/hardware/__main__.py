"""What a network costs on hardware: bytes, operations, energy, and time on CPU, TPU v1 and EIE.

    python -m trainer.hardware RUN_DIR                        a finished run
    python -m trainer.hardware FILE.dcz [EXPERIMENT]          a compressed model
    python -m trainer.hardware EXPERIMENT [key=value ...]     an experiment, before it is run

The costs of a finished run are added to its summary.json and report.html. A file gets its model and
data from the run directory that it is in, or from an experiment; without both, a model of
`trainer.models` computes random samples. An experiment's phases are applied without training, so
that sizes and densities are assumptions.

Exit codes: 0 done, 1 failed, 2 wrong arguments.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from torch import Tensor, nn

from trainer import artifact, models
from trainer.artifact import ArtifactError
from trainer.compress.rewrite import restore
from trainer.config.compose import compose_config
from trainer.config.renamed import rename_keys
from trainer.driver.report import write_report
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError, first_line, one_line
from trainer.experiment import Experiment
from trainer.hardware.costs import CostSettings, NetworkCosts, network_costs, random_samples
from trainer.hardware.energy import TABLES, EnergyTable
from trainer.hardware.figures import Evidence
from trainer.library.objects import load_objects
from trainer.phases import Phase, RoundPhase, StructuralPhase, StructuredPrune
from trainer.phases.structure import apply_changes, class_path, from_metadata
from trainer.report.hardware import table
from trainer.report.output import silence
from trainer.report.table import rich_table
from trainer.store.directory import RunDirectory
from trainer.store.serialization import from_bytes

DONE, FAILED, WRONG = 0, 1, 2

_SAMPLES = 8  # over which densities of activations are averaged
_WIDE = 1000  # columns where the output is no terminal

# The models of files without a run or an experiment: their sources, and the shapes of samples.
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
    """What the costs are computed of."""

    model: nn.Module
    dense: nn.Module  # the same without quantizers
    samples: Tensor
    file: bytes | None
    evidence: Evidence = "measured"
    notes: tuple[str, ...] = ()
    run: tuple[RunDirectory, Experiment] | None = None  # whose report shows the costs


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        settings = CostSettings(
            table=_energy_table(options.energy),
            buffer_bytes=int(1024 * _positive("--buffer-kib", options.buffer_kib)),
            batch=int(_positive("--batch", options.batch)),
            threads=int(_positive("--threads", options.threads)),
            cpu_watts=options.cpu_watts and _positive("--cpu-watts", options.cpu_watts),
        )
        count = max(_SAMPLES, settings.batch)
        subject = _subject(options.what, options.overrides, options.config_dir, count)
        costs = network_costs(
            subject.model, subject.samples, subject.file, settings, subject.evidence, subject.dense
        )
        costs = replace(costs, notes=(*subject.notes, *costs.notes))
        _show(costs, options.json)
        if subject.run is not None:
            _add_to_report(costs, *subject.run)
    except ConfigError as error:
        print(f"wrong arguments: {one_line(str(error))}", file=sys.stderr)
        return WRONG
    except ArtifactError as error:
        print(f"{options.what}: {error}", file=sys.stderr)
        return FAILED
    except RunError as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"{error.filename or options.what}: {error.strerror or error}", file=sys.stderr)
        return FAILED
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.hardware",
        description="What a network costs: bytes, operations, energy, time on CPU, TPU v1 and EIE.",
    )
    parser.add_argument("what", metavar="RUN_DIR|FILE|EXPERIMENT")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="changed settings of the experiment; after a FILE, the experiment's name comes first",
    )
    parser.add_argument("--json", metavar="OUT", help="write all figures to a file; -: print them")
    parser.add_argument("--batch", type=int, default=1, help="samples computed together")
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--cpu-watts", type=float, help="power of the busy CPU")
    parser.add_argument(
        "--energy",
        default="eie",
        metavar="TABLE",
        help=f"energies of operations: {', '.join(TABLES)}, or a YAML file",
    )
    parser.add_argument(
        "--buffer-kib", type=float, default=128, metavar="N", help="on-chip buffer, 1 KiB = 1024 B"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder with your configuration files")
    return parser


def _positive(name: str, value: float) -> float:
    if value <= 0:
        raise ConfigError(f"{name}={value:g}: it must be above 0")
    return value


def _energy_table(name: str) -> EnergyTable:
    """A named table, or one of a YAML file with the fields of `EnergyTable`."""
    if name in TABLES:
        return TABLES[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--energy={name}: neither a file nor one of {', '.join(TABLES)}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        fields["assumed"] = frozenset(fields.get("assumed", ()))
        return EnergyTable(**{"name": path.stem, "source": str(path), **fields})
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--energy={name}: {first_line(error)}; it needs multiply: {{int8: pJ, fp32: pJ}}, "
            "add: {int32: pJ, fp32: pJ}, on_chip_word: pJ and off_chip_word: pJ"
        ) from error


def _subject(what: str, overrides: list[str], config_dir: str | None, count: int) -> Subject:
    """Find out what is meant and load it."""
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
    weights, metadata = (
        (artifact.loads(content), artifact.read_about(content)) if coded else from_bytes(content)
    )
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
            f"{path}: which model and data it belongs to is not known; give the run directory, or "
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
    """An experiment's model after its phases, which train nothing."""
    model, dense = experiment.build_model(), experiment.build_model()
    samples = _validation_samples(experiment, count)
    world = World.single(torch.device("cpu"))
    notes = ["weights are not trained: sizes and densities are assumptions"]
    for name, phase in experiment.phases.items():
        if isinstance(phase, RoundPhase):
            notes.append(f"phase {name} is left out: what it does depends on training")
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


def _validation_samples(experiment: Experiment, count: int) -> Tensor:
    """The first samples of the validation data; from the beginning again if there are too few."""
    split = experiment.build_data().validation
    indices = torch.arange(count) % len(split)
    ((inputs, _),) = split.batches([indices], None)
    if not isinstance(inputs, Tensor):
        raise ConfigError("the cost on hardware is only known for models with one input tensor")
    return inputs


def _show(costs: NetworkCosts, out: str | None) -> None:
    """Print the table, or the figures as JSON."""
    plain = costs.as_dict()
    if out == "-":
        _print(json.dumps(plain, indent=2))
        return
    if out is not None:
        Path(out).write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDE
    with console.capture() as capture:
        console.print(rich_table(table(plain), console.width))
    _print(capture.get().strip("\n"))


def _print(text: str) -> None:
    """Print to standard output, whose reader may have gone."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        silence(sys.stdout)


def _add_to_report(costs: NetworkCosts, directory: RunDirectory, experiment: Experiment) -> None:
    """Add the costs to summary.json and report.html of a run that has ended."""

    def notify(line: str) -> None:
        print(line, file=sys.stderr)

    with directory.locked(notify):
        summary = directory.read_summary()
        if summary is None:
            return
        summary["hardware"] = costs.as_dict()
        directory.write_summary(summary)
        write_report(summary, experiment, directory, notify)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
