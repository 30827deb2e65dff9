"""A network on CIFAR-10: dense, as a small file, and with half of the operations.

    python benchmarks/cifar10.py --data DIR [--net ResNet-20] [--out outputs/cifar10] [--epochs 30]
        [--seed 0]

The network is ResNet-20, or a VGG of 7 layers and 0.3 million parameters (`--net VGG-7`). DIR
holds train.zip and test.zip, or the folders train and test, with one folder of images per
class. A tenth of the training images is held out for validation. The dense network is trained
first, and then serves three runs: pruned, retrained, shared and coded; trained for size; and with
channels removed until half of the multiply-accumulates remain. The dense and the narrow network are
exported to ONNX, and onnxruntime runs them in turns. A run whose folder is complete is not
repeated.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

import trainer
from trainer.config import DistillConfig, FitConfig
from trainer.models import ResNetCifar
from trainer.phases import EntropyPenalty, Phase, Prune, Retrain, Share, StructuredPrune, Train


def vgg7() -> nn.Module:
    """Pairs of 3x3 convolutions with batch norm of 32, 64 and 128 filters, and a linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (32, 64, 128):
        for _ in range(2):
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4 * 4, 10))


NETS = {"ResNet-20": ResNetCifar, "VGG-7": vgg7}
SGD = {"_target_": "torch.optim.SGD", "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}
ADAM = {"_target_": "torch.optim.Adam"}
COMPARED = ("dense", "half")  # runs whose networks are exported, and timed in turns


def chains(epochs: int, steps: int | None) -> dict[str, dict[str, Any]]:
    """The settings of each run by its name.

    Args:
        epochs: Of the dense network; the other runs take a third of them.
        steps: Maximum number of steps per phase; None: no maximum.
    """
    short = max(1, epochs // 3)

    def fit(epochs: int, lr: float, **more: Any) -> dict[str, FitConfig]:
        return {"fit": FitConfig(epochs=epochs, lr=lr, max_steps=steps, **more)}

    def sgd(*phases: Phase) -> dict[str, Any]:
        return {"phases": list(phases), "optimizer": SGD}

    teacher = DistillConfig(weight=0.5, temperature=2.0)
    return {
        "dense": sgd(Train(**fit(epochs, 0.1, warmup_epochs=1))),
        "small file": sgd(
            Prune(0.8, **fit(max(1, short // 3), 0.02)),
            Retrain(**fit(short - short // 3, 0.02, distill=teacher)),
            Share(bits=4, **fit(1, 1e-3)),
        ),
        "half": sgd(
            StructuredPrune(0.5, multiple=8),
            Retrain(**fit(short, 0.05, distill=teacher)),
        ),
        "trained for size": {
            "phases": [
                EntropyPenalty(bytes=40_000, sort_units=True, **fit(short, 2e-3, distill=teacher))
            ],
            "optimizer": ADAM,
        },
    }


def run(name: str, settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """The summary of a run, which is made unless it is there."""
    folder = args.out / name.replace(" ", "-")
    dense = args.out / "dense" / "model.safetensors"
    if not (folder / "summary.json").exists():
        trainer.run(
            model=NETS[args.net](),
            data=trainer.data.images(args.data, pad=4, flip=True),
            batch_size=128,
            lr=0.1,
            precision="bf16",
            channels_last=True,
            init_from=None if name == "dense" else dense,
            artifact=name != "dense",
            export={"onnx": name in COMPARED},
            cluster={"backend": "inline", "threads": args.threads},
            seed=args.seed,
            out=folder,
            **settings,
        )
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return summary


def latencies(files: list[Path], repeats: int) -> list[float]:
    """Median milliseconds of each model for one image, in turns, with one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    sessions = [onnxruntime.InferenceSession(str(file), options) for file in files]
    image = {sessions[0].get_inputs()[0].name: torch.randn(1, 3, 32, 32).numpy()}
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(repeats):
        for session, found in zip(sessions, times, strict=True):
            begin = time.perf_counter()
            session.run(None, image)
            found.append(1e3 * (time.perf_counter() - begin))
    return [statistics.median(found) for found in times]


def few_images(folder: Path) -> Path:
    """A data set of a few grey images, for --quick."""
    for part in ("train", "test"):
        for label in ("dark", "light"):
            (folder / part / label).mkdir(parents=True)
            for number in range(20):
                level = 100 * (label == "light") + number
                Image.new("RGB", (32, 32), (level, level, level)).save(
                    folder / part / label / f"{number}.png"
                )
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with train.zip and test.zip")
    parser.add_argument("--net", choices=NETS, default="ResNet-20")
    parser.add_argument("--out", type=Path, default=Path("outputs/cifar10"))
    parser.add_argument("--epochs", type=int, default=30, help="of the dense network")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="by default all CPUs")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.quick:
            args.data, args.epochs = few_images(Path(folder)), 1
        elif args.data is None:
            parser.error("--data is needed")
        settings = chains(args.epochs, 1 if args.quick else None)
        found = {name: run(name, each, args) for name, each in settings.items()}
    files = [args.out / name / "model.onnx" for name in COMPARED]
    times = dict(zip(COMPARED, latencies(files, 3 if args.quick else 500), strict=True))
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, seed {args.seed}; command: python {' '.join(sys.argv)}"
    )
    weights = sum(p.numel() for p in NETS[args.net]().parameters())
    print(
        "| run | test accuracy | bytes | MACs | onnxruntime, ms |\n| --- | --- | --- | --- | --- |"
    )
    for name, summary in found.items():
        file = summary.get("artifact", {"bytes": 4 * weights, "accuracy": summary["accuracy"]})
        macs = summary["phases"][-1]["macs"]
        latency = f"{times[name]:.3f}" if name in times else ""
        found = f"{file['accuracy']:.2%} | {file['bytes']:,}"
        print(f"| {name} | {found} | {macs:,} | {latency} |")


if __name__ == "__main__":
    main()
