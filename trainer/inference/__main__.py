"""Measure the latency of a compressed model in the engine, PyTorch and onnxruntime.

    python -m trainer.inference FILE.dcz [EXPERIMENT]         a compressed model
    python -m trainer.inference RUN_DIR                       a finished run
    python -m trainer.inference EXPERIMENT [key=value ...]    an experiment, before it is run

A file gets its model and data from the run directory that it is in, or from an experiment; without
both, a model of `trainer.models` computes random samples. The libraries are measured in turn; the
times are medians. onnxruntime is measured if it is installed (pip install '.[onnx]').

Exit codes: 0 done, 1 failed, 2 wrong arguments.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from trainer.export.onnx import is_quantized
from trainer.inference.latency import ENGINE, Latencies, measure_latencies
from trainer.library.subject import find_subject, quantized_copy
from trainer.library.subject_command import exit_code, positive, show, subject_parser
from trainer.models.copying import copy_model
from trainer.report.table import Table


def main(arguments: Sequence[str]) -> int:
    """Execute the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    return exit_code(options.what, lambda: _measure(options))


def _measure(options: argparse.Namespace) -> None:
    for name in ("batch", "threads", "seconds"):
        positive(f"--{name}", getattr(options, name))
    subject = find_subject(
        options.what, options.overrides, options.config_dir, max(2, options.batch)
    )
    model, samples = subject.model, subject.samples[: options.batch]
    dense = copy_model(subject.dense)
    weights = model.state_dict()
    dense.load_state_dict({k: v for k, v in weights.items() if k in dense.state_dict()}, False)
    quantized = None
    if not is_quantized(model) and not options.no_onnx:
        quantized = quantized_copy(model, subject.samples)
    found = measure_latencies(
        model,
        dense,
        samples,
        quantized,
        onnx=not options.no_onnx,
        threads=options.threads,
        seconds=options.seconds,
    )
    batch, threads = options.batch, options.threads
    tables = [_times(found, batch, threads, list(subject.notes)), _layers(found)]
    show(tables, {"batch": batch, "threads": threads, **asdict(found)}, options.json)


def _parser() -> argparse.ArgumentParser:
    parser = subject_parser(
        "trainer.inference",
        "The latency of a compressed model in the engine, PyTorch and onnxruntime.",
        threads="threads of each library",
        json_help="write the times to a file; -: print them",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to measure")
    parser.add_argument("--no-onnx", action="store_true", help="leave onnxruntime out")
    return parser


def _times(found: Latencies, batch: int, threads: int, notes: list[str]) -> Table:
    engine = found.seconds[ENGINE]
    rows = [
        (name, f"{1e3 * seconds:.3f}", f"{seconds / engine:.2f}")
        for name, seconds in found.seconds.items()
    ]
    rows += [(name, "-", "-") for name in found.missing]
    lines = [f"{name}: {reason}" for name, reason in found.missing.items()]
    title = f"Batch of {batch}, {threads} thread{'s' * (threads > 1)}, medians of {found.rounds}"
    return Table(
        title,
        ("", "milliseconds", "of the engine's time"),
        rows,
        "\n".join([*lines, *notes]),
    )


def _layers(found: Latencies) -> Table:
    names = list(dict.fromkeys(kernel for row in found.layers for kernel in row.microseconds))
    rows = []
    for row in found.layers:
        times: dict[str, Any] = {k: f"{v:,.1f}" for k, v in row.microseconds.items()}
        bits = "-" if row.code_bits is None else str(row.code_bits or 32)
        cells = (row.kind, f"{100 * row.density:.1f}%", bits, row.kernel or "-", f"{row.nbytes:,}")
        rows.append((row.layer, *cells, *(times.get(name, "-") for name in names)))
    columns = ("layer", "class", "nonzero", "bits of a value", "kernel", "bytes")
    caption = "Layers that are not listed stay in PyTorch." if rows else "No layer is compressed."
    return Table(
        "Kernels of the engine",
        (*columns, *(f"{name} us" for name in names)),
        rows,
        caption,
        optional=("class", "bits of a value", "bytes"),
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
