"""How small can a trained model become before it loses accuracy?

    python examples/how_small.py [--weights FILE.pt] [--images 55000] [--out runs/how_small]

Compresses one model with several strengths, from the mildest on, and stops where the accuracy on
the test set falls by more than a point. The workers start once, for all runs. Without --weights,
the model is trained first. About three minutes on two CPU cores.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import trainer
from trainer.phases import Phase, Prune, Retrain, Share, Train

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
MAX_DROP = 0.01  # of the accuracy


class Net(nn.Module):
    """Put your own model here."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        )
        self.hidden = nn.Linear(32 * 49, 128)
        self.output = nn.Linear(128, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(torch.relu(self.hidden(self.features(images).flatten(1))))


def phases(sparsity: float) -> list[Phase]:
    """The last layer has few weights, which all matter, so it keeps half of them."""
    return [
        Prune(sparsity, overrides={"output": 0.5}),
        Retrain(epochs=1, lr=0.01),
        Share(bits=4, epochs=1, lr=1e-3),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="How small can a trained model become?")
    parser.add_argument("--weights", help="a state_dict written by torch.save")
    parser.add_argument("--images", type=int, default=55000, help="number of training images")
    parser.add_argument("--out", type=Path, default=Path("runs/how_small"))
    args = parser.parse_args()
    data = trainer.data.mnist(train=args.images)
    model = Net()

    with trainer.Session(workers=2, progress=False) as session:
        if args.weights:
            model.load_state_dict(torch.load(args.weights, weights_only=True))
        else:
            train = [Train(epochs=2)]
            dense = session.run(model=Net, data=data, phases=train, lr=0.05, out=args.out / "dense")
            model = dense.model
        print("sparsity     bytes  smaller  accuracy")
        for sparsity in SPARSITIES:
            result = session.run(
                model=model,
                data=data,
                phases=phases(sparsity),
                artifact=True,
                out=args.out / f"{sparsity:g}",
            )
            file = result.summary["artifact"]
            print(
                f"{sparsity:8.0%} {file['bytes']:9,} {file['ratio']:7.0f}x {file['accuracy']:9.2%}"
            )
            if file["baseline_accuracy"] - file["accuracy"] > MAX_DROP:
                print(f"The last one is more than {MAX_DROP:.0%} below the original.")
                break


if __name__ == "__main__":
    main()
