"""The cost of a network on hardware: bytes, operations, energy, and time on CPU, TPU v1 and EIE.

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
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import yaml

from trainer.driver.report import write_report
from trainer.errors import ConfigError, first_line
from trainer.experiment import Experiment
from trainer.hardware.costs import CostSettings, NetworkCosts, add_engine, network_costs
from trainer.hardware.cpu import measure_model
from trainer.hardware.energy import TABLES, EnergyTable
from trainer.inference import compile, layer_kernels
from trainer.library.subject import Subject, find_subject
from trainer.library.subject_command import exit_code, positive, show, subject_parser
from trainer.models.copying import copy_model
from trainer.report.hardware import table
from trainer.store.directory import RunDirectory

_SAMPLES = 8  # over which densities of activations are averaged


def main(arguments: Sequence[str]) -> int:
    """Execute the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code(options.what, lambda: _calculate(options))


def _calculate(options: argparse.Namespace) -> None:
    watts = options.cpu_watts
    settings = CostSettings(
        table=_energy_table(options.energy),
        buffer_bytes=int(1024 * positive("--buffer-kib", options.buffer_kib)),
        batch=int(positive("--batch", options.batch)),
        threads=int(positive("--threads", options.threads)),
        cpu_watts=watts if watts is None else positive("--cpu-watts", watts),
    )
    count = max(_SAMPLES, settings.batch)
    subject = find_subject(options.what, options.overrides, options.config_dir, count)
    costs = network_costs(
        subject.model, subject.samples, subject.file, settings, subject.evidence, subject.dense
    )
    costs = _with_engine(replace(costs, notes=(*subject.notes, *costs.notes)), subject)
    show([table(costs.as_dict())], costs.as_dict(), options.json)
    if subject.run is not None:
        _add_to_report(costs, *subject.run)


def _parser() -> argparse.ArgumentParser:
    parser = subject_parser(
        "trainer.hardware",
        "What a network costs: bytes, operations, energy, time on CPU, TPU v1 and EIE.",
        threads="threads of the CPU",
        json_help="write all figures to a file; -: print them",
    )
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
    return parser


def _energy_table(name: str) -> EnergyTable:
    """A named table, or one of a YAML file with the fields of `EnergyTable`."""
    if name in TABLES:
        return TABLES[name]
    path = Path(name)
    if not os.path.isfile(path):
        raise ConfigError(f"--energy={name}: neither a file nor one of {', '.join(TABLES)}")
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
        fields["assumed"] = frozenset(fields.get("assumed", ()))
        return EnergyTable(**{"name": path.stem, "source": str(path), **fields})
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"--energy={name}: {first_line(error)}; it needs multiply: {{int8: pJ, fp32: pJ}}, "
            "add: {int32: pJ, fp32: pJ}, on_chip_word: pJ and off_chip_word: pJ"
        ) from error


def _with_engine(costs: NetworkCosts, subject: Subject) -> NetworkCosts:
    """The costs with the measured time of the engine, if it replaces any layer."""
    settings = costs.settings
    batch = subject.samples[: settings.batch]
    try:
        model = compile(copy_model(subject.model), samples=batch, threads=settings.threads)
    except ConfigError as error:  # such as weights that are not float32
        return replace(costs, notes=(*costs.notes, f"engine: {error}"))
    if not layer_kernels(model):
        return costs
    watts, seconds = settings.cpu_watts, settings.cpu_seconds
    return add_engine(costs, measure_model(model, batch, settings.threads, watts, seconds))


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
