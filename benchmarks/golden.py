"""Proves that a refactoring changes no result: the same runs on two versions, compared bit by bit.

    python benchmarks/golden.py BASE [--head COMMIT] [--runs NAME ...] [--quick]

BASE and COMMIT are git revisions; without `--head` the working tree is compared, uncommitted
changes included. Each version runs the chains below through the command line, in a process of its
own, from a checkout of its own: train, prune, retrain, share and quantize on LeNet-5, shrunk to
seconds, with one worker in the process, with one and with two Ray workers; and the search for
sparsity. Compared are the final weights, the losses of every epoch, and the size of model.dcz.
Exit code 0: all equal; 1: a difference, which is named.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]

CHAIN = """# @package _global_
# The whole chain, shrunk
defaults:
  - /phase@phases.train: train
  - /phase@phases.prune: prune
  - /phase@phases.retrain: retrain
  - /phase@phases.share: share
  - /phase@phases.quantize: quantize
  - _self_

name: golden
data: {train: 480, validation: 200, test: 200, shift: 1}
cluster: {threads: 1, device: cpu}
phases:
  train: {fit: {epochs: 2, warmup_epochs: 0.5, clip: 1.0}}
  prune: {sparsity: 0.9, scope: global, schedule: cubic, interval: 2, fit: {epochs: 2}}
  retrain: {fit: {epochs: 1, accumulate: 2, distill: {weight: 0.5, temperature: 2.0}}}
  share: {bits: 4, biases: 3, rate: 0.01, fit: {epochs: 1, lr: 0.001}}
  quantize: {per_channel: false, keep: [zeros, sharing], fit: {epochs: 1, lr: 0.001}}
artifact: {make: true}
"""
SEARCH = """# @package _global_
# The search for sparsity, shrunk
defaults:
  - /phase@phases.train: train
  - /phase@phases.prune: prune
  - _self_
  - override /model: lenet300

name: search
data: {train: 480, validation: 200, test: 200}
cluster: {threads: 1, device: cpu}
phases:
  train: {fit: {epochs: 2}}
  prune: {sparsity: auto, max_drop: 0.05, rounds: 3, fit: {epochs: 1}}
"""
RUNS = {
    "inline": ["+experiment=chain", "cluster=inline"],
    "one worker": ["+experiment=chain", "cluster.workers=1", "optimizer=adam"],
    "two workers, bf16": ["+experiment=chain", "precision=bf16", "channels_last=true"],
    "search": ["+experiment=search", "cluster=inline"],
}


def run(code: Path, folder: Path, arguments: list[str]) -> None:
    """Run the command of the version whose checkout is `code`; the results go to `folder`."""
    conf = folder.parent / "conf"
    (conf / "experiment").mkdir(parents=True, exist_ok=True)
    (conf / "experiment" / "chain.yaml").write_text(CHAIN)
    (conf / "experiment" / "search.yaml").write_text(SEARCH)
    command = [sys.executable, "-P", "-m", "trainer", "--config-dir", str(conf), *arguments]
    done = subprocess.run(
        [*command, f"hydra.run.dir={folder}"],
        cwd=folder.parent,
        env={**os.environ, "PYTHONPATH": str(code)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{code}: {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")


def differences(base: Path, head: Path) -> list[str]:
    """What differs between the results in two run directories, a line each."""
    found = []
    before, after = (load_file(folder / "model.safetensors") for folder in (base, head))
    for name in sorted({*before, *after}):
        if name not in before or name not in after:
            found.append(f"{name} is only in {'head' if name in after else 'base'}")
        elif not torch.equal(_bits(before[name]), _bits(after[name])):
            found.append(f"{name} has other bits")
    epochs = [_losses(folder) for folder in (base, head)]
    if epochs[0] != epochs[1]:
        found.append(f"losses {epochs[0]} became {epochs[1]}")
    sizes = [_size(folder) for folder in (base, head)]
    if sizes[0] != sizes[1]:
        found.append(f"model.dcz had {sizes[0]} bytes, now {sizes[1]}")
    return found


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _losses(folder: Path) -> list[Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [(line["phase"], line["train_loss"], line["loss"]) for line in map(json.loads, lines)]


def _size(folder: Path) -> int | None:
    """Bytes of what model.dcz holds besides its header, which may say more or less."""
    artifact = json.loads((folder / "summary.json").read_text()).get("artifact")
    return artifact and sum(layer["bytes"] for layer in artifact["layers"])


def checkout(revision: str, folder: Path) -> Path:
    """A revision of this repository as a folder of files."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision], check=True, capture_output=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the results of two versions, bit by bit.")
    parser.add_argument("base", help="git revision to compare with")
    parser.add_argument("--head", help="git revision to compare; by default the working tree")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    options = parser.parse_args()
    if options.quick:
        options.runs = ["search"]
    work = Path(tempfile.mkdtemp(prefix="golden-"))
    try:
        base = checkout(options.base, work / "base-code")
        head = checkout(options.head, work / "head-code") if options.head else ROOT
        wrong = 0
        for number, name in enumerate(options.runs):
            folders = [work / side / f"run-{number}" for side in ("base", "head")]
            for code, folder in zip((base, head), folders, strict=True):
                folder.parent.mkdir(exist_ok=True)
                run(code, folder, RUNS[name])
            found = differences(*folders)
            print(f"{name}: {'; '.join(found) or 'equal'}", flush=True)
            wrong += len(found)
        return 1 if wrong else 0
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    sys.exit(main())
