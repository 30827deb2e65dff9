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
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml
from rich.console import Console

from trainer.artifact import ArtifactError
from trainer.driver.report import write_report
from trainer.errors import ConfigError, RunError, first_line, one_line
from trainer.experiment import Experiment
from trainer.hardware.costs import CostSettings, NetworkCosts, add_engine, network_costs
from trainer.hardware.cpu import measure_model
from trainer.hardware.energy import TABLES, EnergyTable
from trainer.inference import compile, layer_kernels
from trainer.library.subject import Subject, find_subject
from trainer.report.hardware import table
from trainer.report.output import silence
from trainer.report.table import rich_table
from trainer.store.directory import RunDirectory

DONE, FAILED, WRONG = 0, 1, 2

_SAMPLES = 8  # over which densities of activations are averaged
_WIDE = 1000  # columns where the output is no terminal


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
        subject = find_subject(options.what, options.overrides, options.config_dir, count)
        costs = network_costs(
            subject.model, subject.samples, subject.file, settings, subject.evidence, subject.dense
        )
        costs = _with_engine(replace(costs, notes=(*subject.notes, *costs.notes)), subject)
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


def _with_engine(costs: NetworkCosts, subject: Subject) -> NetworkCosts:
    """The costs with the measured time of the engine, if it replaces any layer."""
    settings = costs.settings
    batch = subject.samples[: settings.batch]
    model = compile(copy.deepcopy(subject.model), samples=batch, threads=settings.threads)
    if not layer_kernels(model):
        return costs
    watts, seconds = settings.cpu_watts, settings.cpu_seconds
    return add_engine(costs, measure_model(model, batch, settings.threads, watts, seconds))


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
