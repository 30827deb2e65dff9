"""Interrupt a run in the middle, resume it, and get the weights of an undisturbed run, bit for bit.

    python examples/resume.py [--images 20000] [--out runs/resume]

Here a sink interrupts the run after its second epoch. Ctrl-C does the same, and so does SIGTERM,
which job schedulers send. Half a minute on two CPU cores.
"""

import argparse
import signal
from pathlib import Path

import torch

import trainer
from trainer.messages import EpochEnded
from trainer.models import LeNet300
from trainer.phases import Prune, Retrain, Train


class InterruptAfter:
    """A sink that sends Ctrl-C to its own process at the end of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on(self, message: object) -> None:
        if isinstance(message, EpochEnded) and message.epoch == self.epoch:
            signal.raise_signal(signal.SIGINT)

    def close(self) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description="Interrupt a run, and resume it.")
    parser.add_argument("--images", type=int, default=20000, help="number of training images")
    parser.add_argument("--out", type=Path, default=Path("runs/resume"))
    args = parser.parse_args()
    settings = {
        "model": LeNet300,
        "data": trainer.data.mnist(train=args.images),
        "phases": [Train(epochs=3), Prune(0.9), Retrain(epochs=1)],
        "workers": 1,
        # This process is the worker, and no other is started; Ray workers give equal bits, too.
        "cluster": {"backend": "inline", "threads": 1},
        "progress": False,
    }

    undisturbed = trainer.run(**settings, out=args.out / "undisturbed")
    print(undisturbed)

    interrupted = args.out / "interrupted"
    try:
        trainer.run(**settings, logger={"stop": InterruptAfter(epoch=2)}, out=interrupted)
    except trainer.Interrupted as error:
        print(error)
    resumed = trainer.resume(interrupted, progress=False)
    print(resumed)

    weights = undisturbed.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    print("The weights of both runs are equal, bit for bit.")


if __name__ == "__main__":
    main()
