"""int8 against fp32 in onnxruntime: latency and size of what the quantize phase leaves.

    pip install -e '.[onnx]'
    python benchmarks/onnx_latency.py [--repeats 200]

LeNet-5 and ResNet-20 (16, 32, 64 filters) on images of MNIST size, batch 1 and 32, one thread. The
weights are the initial ones, the ranges those of random images: neither matters for time. The two
files take turns; a ratio is the median of the ratios within each turn.
"""

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable

import onnxruntime
import torch
from torch import nn

from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.export.onnx import to_onnx
from trainer.export.runtime import BATCHES, OnnxModel
from trainer.models import LeNet5, ResNetCifar
from trainer.phases import Quantize

NETS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "LeNet-5": (LeNet5, []),
    "ResNet-20": (lambda: ResNetCifar(20, in_channels=1), ["conv", "*conv2"]),
}


def quantized(model: nn.Module, outputs: list[str]) -> nn.Module:
    world = World.single(torch.device("cpu"))
    phase = Quantize(FitConfig(epochs=1), outputs=outputs)
    phase.enter(model, world)
    model.train()(torch.rand(64, 1, 28, 28))
    phase.after_step(model, world, 1, 1)
    phase.leave(model)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"# int8 against fp32, {datetime.date.today()}\n\n"
        f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"onnxruntime {onnxruntime.__version__}; command: python {' '.join(sys.argv)}\n\n"
        "| net | batch | fp32 ms | int8 ms | ratio | bytes | n |\n|" + " --- |" * 7
    )
    for name, (build, outputs) in NETS.items():
        sample = torch.rand(2, 1, 28, 28)
        plain = to_onnx(build().eval(), sample)
        small = to_onnx(quantized(build(), outputs), sample)
        files = OnnxModel(plain), OnnxModel(small)
        for batch in BATCHES:
            images = torch.rand(batch, 1, 28, 28)
            times: list[list[float]] = []
            for _ in range(args.repeats + 10):
                turn = []
                for file in files:
                    started = time.perf_counter()
                    file(images)
                    turn.append(1e3 * (time.perf_counter() - started))
                times.append(turn)
            columns = [statistics.median(column) for column in zip(*times[10:], strict=True)]
            ratio = statistics.median(int8 / fp32 for fp32, int8 in times[10:])
            print(
                f"| {name} | {batch} | {columns[0]:.3f} | {columns[1]:.3f} | {ratio:.2f} | "
                f"{len(small) / len(plain):.2f} | {args.repeats} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
