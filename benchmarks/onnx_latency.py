"""int8 against fp32 in onnxruntime: latency, size and accuracy of what a whole run leaves.

    pip install -e '.[onnx]'
    python benchmarks/onnx_latency.py --out DIR [--repeats 200] [--quick] [key=value ...]

Trains LeNet-5 (as +experiment=qat ships it) and ResNet-20 (16, 32, 64 filters, 4 epochs and 1 with
quantization) on MNIST by the command, with further settings where they are given; DIR keeps both
runs, and a run that is done is not done again. model.onnx of a run is then held against its dense
stage, exported likewise. Accuracies are onnxruntime's, on the test set. Latencies: batch 1 and 32,
one thread; the two files take turns, a ratio is the median of the ratios within each turn.
"""

import argparse
import datetime
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import onnxruntime
import torch
import yaml
from safetensors.torch import load_file

from trainer.data.split import Split
from trainer.experiment import Experiment
from trainer.export.onnx import to_onnx
from trainer.export.runtime import BATCHES, OnnxModel

NETS = {
    "LeNet-5": [],
    "ResNet-20": [
        "model=resnet_cifar",
        "model.in_channels=1",
        'phases.quantize.outputs=[conv,"*conv2"]',
        "phases.train.fit.epochs=4",
        "phases.quantize.fit.epochs=1",
    ],
}
QUICK = [
    *("data.train=128", "data.validation=64", "data.test=64", "phases.train.fit.epochs=1"),
    *("phases.quantize.fit.epochs=1", "artifact.make=false"),
]
WARM_UP = 10  # turns that are not counted


def run(folder: Path, settings: list[str]) -> None:
    command = [sys.executable, "-m", "trainer", "+experiment=qat", "cluster=inline"]
    subprocess.run([*command, f"hydra.run.dir={folder}", *settings], check=True, stdout=sys.stderr)


def files(folder: Path, experiment: Experiment, test: Split) -> tuple[bytes, bytes]:
    """The dense model and the quantized one, as ONNX files."""
    dense = experiment.load_model(load_file(folder / "checkpoints" / "01-train.safetensors"))
    ((sample, _),) = test.batches([torch.arange(2)], None)
    return to_onnx(dense.eval(), sample), (folder / "model.onnx").read_bytes()


def accuracy(model: OnnxModel, test: Split) -> float:
    """In percent."""
    batches = test.batches(torch.arange(len(test)).split(256), None)
    right = sum(
        int((model(inputs).argmax(1) == targets.numpy()).sum()) for inputs, targets in batches
    )
    return 100 * right / len(test)


def turns(models: list[OnnxModel], inputs: torch.Tensor, repeats: int) -> list[list[float]]:
    """Milliseconds that each model takes for a batch, turn by turn."""
    taken = []
    for _ in range(repeats + WARM_UP):
        turn = []
        for model in models:
            started = time.perf_counter()
            model(inputs)
            turn.append(1e3 * (time.perf_counter() - started))
        taken.append(turn)
    return taken[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--repeats", type=int, default=200, help="turns of each latency")
    parser.add_argument("settings", nargs="*", help="key=value, for both runs")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    nets = NETS
    if args.quick:
        nets, args.repeats = {"LeNet-5": NETS["LeNet-5"]}, 1
        args.settings += QUICK
    sizes, latencies = [], []
    for name, settings in nets.items():
        folder = args.out.absolute() / name
        if not (folder / "model.onnx").exists():
            run(folder, [*settings, *args.settings])
        experiment = Experiment.from_config(yaml.safe_load((folder / "config.yaml").read_text()))
        test = experiment.build_data().test
        contents = files(folder, experiment, test)
        models = [OnnxModel(content) for content in contents]
        before, after = (accuracy(model, test) for model in models)
        fp32, int8 = map(len, contents)
        sizes.append(
            f"| {name} | {fp32:,} | {int8:,} | {int8 / fp32:.2f} | {before:.2f} | {after:.2f} | "
            f"{before - after:.2f} | {len(test):,} |"
        )
        for batch in BATCHES:
            ((inputs, _),) = test.batches([torch.arange(batch)], None)
            taken = turns(models, inputs, args.repeats)
            medians = [statistics.median(column) for column in zip(*taken, strict=True)]
            ratio = statistics.median(int8 / fp32 for fp32, int8 in taken)
            latencies.append(
                f"| {name} | {batch} | {medians[0]:.3f} | {medians[1]:.3f} | {ratio:.2f} | "
                f"{args.repeats} |"
            )
    print(
        f"# int8 against fp32, {datetime.date.today()}\n\n"
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}; command: python {' '.join(sys.argv)}\n\n"
        "| net | bytes fp32 | int8 | ratio | accuracy % fp32 | int8 | points lost | images |\n|"
        + " --- |"
        * 8
    )
    print("\n".join(sizes))
    print("\n| net | batch | ms fp32 | int8 | ratio | n |\n|" + " --- |" * 6)
    print("\n".join(latencies))


if __name__ == "__main__":
    main()
