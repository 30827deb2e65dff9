"""Decode the recorded model files and compare them with the table: bytes, SHA-256, test errors.

    python records/verify.py [NAME ...]

NAME is a folder beside this file; without one, all are verified. Nothing of the runs that made the
files is used: each file is decoded into a fresh model of the class in record.yaml, which classifies
all images of the test set, in fp32. The runs counted in bf16, and another CPU may round sums
differently, so that an error count may be off by a few images, which is printed and allowed. Exit
codes: 0 all are as recorded, 1 one is not.
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import trainer
from trainer.config.instantiate import build_object
from trainer.data import mnist

HERE = Path(__file__).parent
ALLOWED = 3  # images by which a count may differ


@dataclass(frozen=True)
class Run:
    """One model file of a record, and what it is said to be."""

    record: str
    model: str  # dotted path of its class
    seed: int
    path: Path
    bytes: int
    sha256: str
    errors: int  # of the 10,000 test images


def runs(names: Sequence[str] = ()) -> list[Run]:
    """All recorded files of some records; without names, of all."""
    folders = sorted(path.parent for path in HERE.glob("*/record.yaml"))
    unknown = set(names) - {folder.name for folder in folders}
    if unknown:
        known = ", ".join(folder.name for folder in folders)
        raise SystemExit(f"no record is called {', '.join(sorted(unknown))}; there are {known}")
    found = []
    for folder in folders:
        if names and folder.name not in names:
            continue
        record: dict[str, Any] = yaml.safe_load((folder / "record.yaml").read_text())
        for row in record["runs"]:
            values = {key: row[key] for key in ("seed", "bytes", "sha256", "errors")}
            path = folder / row["file"]
            found.append(Run(record=folder.name, model=record["model"], path=path, **values))
    return found


def problems(run: Run) -> list[str]:
    """What is not as recorded about the bytes of a file."""
    content = run.path.read_bytes()
    found = []
    if len(content) != run.bytes:
        found.append(f"{len(content)} bytes")
    if hashlib.sha256(content).hexdigest() != run.sha256:
        found.append("another SHA-256")
    return found


@torch.no_grad()
def count_errors(run: Run) -> int:
    """How many test images the decoded model classifies wrongly."""
    model = build_object("model", {"_target_": run.model}, torch.nn.Module)
    assert isinstance(model, torch.nn.Module)
    trainer.load(run.path, model).eval()
    split = mnist().test
    batches = split.batches(torch.arange(len(split)).split(500), None)
    return sum(int((model(images).argmax(1) != labels).sum()) for images, labels in batches)


def main(names: Sequence[str]) -> int:
    """Verify and print a line per file."""
    failed = False
    for run in runs(names):
        found = problems(run)
        errors = count_errors(run)
        if abs(errors - run.errors) > ALLOWED:
            found.append(f"{errors} errors")
        failed = failed or bool(found)
        verdict = f"NOT AS RECORDED: {', '.join(found)}" if found else "as recorded"
        if not found and errors != run.errors:
            verdict += f" ({errors} errors here)"
        claim = f"{run.bytes:,} bytes, {run.errors / 100:.2f}%"
        print(f"{run.record} seed {run.seed}: {claim}: {verdict}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
