"""A pruning phase and a sink of one's own, without changing the package.

    python examples/own_phase_and_sink.py [--images 20000] [--out runs/own]

The phase prunes two of each four consecutive weights (2:4 sparsity), the pattern that the sparse
matrix units of NVIDIA's GPUs execute. The sink writes a line about each phase to a Markdown table.
Half a minute on two CPU cores.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

import trainer
from trainer.compress.select import weights
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.messages import PhaseEnded
from trainer.models import LeNet300
from trainer.phases import Phase, Retrain, Train


@dataclass
class PruneGroups(Phase):
    """Of each group of consecutive weights of a row, keep the largest."""

    kind: ClassVar[str] = "prune_groups"
    makes: ClassVar[frozenset[str]] = frozenset({"zeros"})  # what later phases must preserve

    kept: int = 2  # weights that each group keeps
    size: int = 4  # weights in a group

    def check_settings(self) -> None:
        if not 0 < self.kept < self.size:
            raise ConfigError(f"kept={self.kept}: it must be between 1 and {self.size - 1}")

    def check_model(self, model: nn.Module) -> None:
        for name, places in weights(model).items():
            columns = places[0].value.flatten(1).shape[1]
            if columns % self.size:
                raise ConfigError(f"{name}: its {columns} columns are no groups of {self.size}")

    def enter(self, model: nn.Module, world: World) -> None:
        with torch.no_grad():
            for places in weights(model).values():
                groups = places[0].value.view(-1, self.size)
                smallest = groups.abs().topk(self.size - self.kept, largest=False).indices
                groups.scatter_(1, smallest, 0.0)


class PhaseTable:
    """Writes a Markdown table with a line for each phase."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "phases.md"
        self.path.write_text("| phase | sparsity | accuracy |\n| --- | --- | --- |\n")

    def on(self, message: object) -> None:
        if isinstance(message, PhaseEnded):
            record = message.record
            with self.path.open("a") as file:
                file.write(f"| {record.name} | {record.sparsity:.1%} | {record.accuracy:.2%} |\n")

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="A pruning phase and a sink of one's own.")
    parser.add_argument("--images", type=int, default=20000, help="number of training images")
    parser.add_argument("--out", type=Path, default=Path("runs/own"))
    args = parser.parse_args()
    result = trainer.run(
        model=LeNet300,
        data=trainer.data.mnist(train=args.images),
        phases=[Train(epochs=2), PruneGroups(), Retrain(epochs=1)],
        workers=1,
        # This process is the worker: no other is started. One thread suffices for a small net.
        cluster={"backend": "inline", "threads": 1},
        logger={"table": PhaseTable(args.out)},
        artifact=True,
        out=args.out / "run",
    )
    print(result)
    print((args.out / "phases.md").read_text())
    groups = result.model.fc1.weight.view(-1, 4)
    assert (groups.count_nonzero(1) <= 2).all()


if __name__ == "__main__":
    main()
