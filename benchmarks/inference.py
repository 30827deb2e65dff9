"""The engine beside PyTorch and onnxruntime: layers of the literature, a map, and whole networks.

    pip install -e '.[onnx]'
    python benchmarks/inference.py [layers] [kernels] [map] [nets] [--seconds 3] [--quick]

layers: fully connected layers with the densities of weights and activations in table III of EIE
(Han et al., ISCA 2016, arXiv:1602.01528), weights drawn at random, shared with 4 bits; one sample,
drawn anew from 8 in turn. kernels: the compressed kernels on these layers. map: a layer of 4096 x
4096 over densities and batches. nets: LeNet-300-100, LeNet-5 and the LSTM of lstm_text with random
weights of the densities in docs/measured.md, one sample. Contestants take turns, one thread;
figures are medians, ratios are of medians, of the CPU time of the thread that computes.
"""

import argparse
import copy
import datetime
import os
import platform
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from trainer.compress.quantize import INPUT, ActivationQuantizer, WeightQuantizer, attach
from trainer.export.onnx import to_onnx
from trainer.export.runtime import OnnxModel
from trainer.inference import compile, layer_kernels
from trainer.inference.build import MIN_DENSITY
from trainer.inference.latency import ENGINE, ONNX, ONNX_INT8, TORCH, measure_latencies
from trainer.inference.measure import alternate, medians
from trainer.library.subject import quantized_copy
from trainer.models import LeNet5, LeNet300, LSTMLanguageModel

LAYERS = {  # inputs, outputs, density of weights, of activations
    "Alex-6": (9216, 4096, 0.09, 0.351),
    "Alex-7": (4096, 4096, 0.09, 0.353),
    "Alex-8": (4096, 1000, 0.25, 0.375),
    "VGG-6": (25088, 4096, 0.04, 0.183),
    "VGG-7": (4096, 4096, 0.04, 0.375),
    "VGG-8": (4096, 1000, 0.23, 0.411),
    "NT-LSTM": (1201, 2400, 0.10, 1.0),
}
# Densities of weights in docs/measured.md: deep_compression_lenet300, deep_compression, lstm_text.
NETS = {
    "LeNet-300-100": (LeNet300, torch.rand(1, 1, 28, 28), 0.02, 15),
    "LeNet-5": (LeNet5, torch.rand(1, 1, 28, 28), 0.012, 15),
    "LSTM": (LSTMLanguageModel, torch.randint(96, (1, 64)), 0.10, 63),
}
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4)
BATCHES = (1, 4, 16, 64)
SIDE = 4096  # inputs and outputs of the layer of the map
QUICK_LAYERS = {"small": (256, 128, 0.1, 0.4)}


def sparse(weight: Tensor, density: float, values: int) -> None:
    """Fill a weight with few distinct values and zeros."""
    book = torch.randn(values) / weight[0].numel() ** 0.5
    kept = torch.rand(weight.shape) < density
    weight.copy_(book[torch.randint(values, weight.shape)] * kept)


def quantized_layer(dense: nn.Linear, xs: list[Tensor]) -> nn.Module:
    """The layer with 8-bit weights and inputs; the grid of least error would take minutes."""
    layer = copy.deepcopy(dense)
    weights, inputs = WeightQuantizer(8), ActivationQuantizer(8)
    weights.scale.copy_(layer.weight.abs().max() / 127)
    layer.weight.copy_((layer.weight / weights.scale).round() * weights.scale)
    inputs.update_range(torch.stack(torch.cat(xs).aminmax()), 1.0)
    attach(layer, "weight", weights)
    attach(layer, INPUT, inputs)
    return nn.Sequential(layer)


def vectors(count: int, inputs: int, density: float) -> list[Tensor]:
    return [torch.randn(1, inputs).abs() * (torch.rand(1, inputs) < density) for _ in range(count)]


def in_turn(functions: list, inputs: list[Tensor]):
    """The function with the next input at each call."""
    state = {name: 0 for name, _ in functions}

    def call(name, function):
        state[name] += 1
        return function(inputs[state[name] % len(inputs)])

    return {name: (lambda n=name, f=function: call(n, f)) for name, function in functions}


def layers(shapes: dict, seconds: float) -> None:
    print(
        "\n| layer | engine ms | kernel | dense fp32 | of it | sparse CSR | onnxruntime int8 "
        "| of it | rounds |\n|" + " --- |" * 9
    )
    against: dict[str, list[float]] = {"dense": [], "int8": []}
    for name, (inputs, outputs, weights, activations) in shapes.items():
        dense = nn.Linear(inputs, outputs).eval().requires_grad_(False)
        sparse(dense.weight, weights, 15)
        xs = vectors(8, inputs, activations)
        engine = compile(nn.Sequential(copy.deepcopy(dense)), samples=xs[0], threads=1)
        csr = dense.weight.to_sparse_csr()
        int8 = OnnxModel(to_onnx(quantized_layer(dense, xs), torch.cat(xs[:2])))
        taken = alternate(
            in_turn(
                [
                    ("engine", engine),
                    ("dense", dense),
                    ("csr", lambda x, csr=csr: csr @ x[0]),
                    ("int8", int8),
                ],
                xs,
            ),
            seconds,
            clock=time.thread_time,
        )
        t = {key: 1e3 * value for key, value in medians(taken).items()}
        for key, ratios in against.items():
            ratios.append(t[key] / t["engine"])
        kernel = layer_kernels(engine)[0].kernel
        print(
            f"| {name} | {t['engine']:.3f} | {kernel} | {t['dense']:.3f} | "
            f"{t['dense'] / t['engine']:.1f}x | {t['csr']:.3f} | {t['int8']:.3f} | "
            f"{t['int8'] / t['engine']:.1f}x | {len(taken['engine'])} |",
            flush=True,
        )
    means = {k: torch.tensor(v).log().mean().exp().item() for k, v in against.items()}
    print(f"\nGeometric means: {means['dense']:.1f}x dense fp32, {means['int8']:.1f}x int8")


def compressed_kernels(weight: Tensor) -> tuple[str, ...]:
    """The kernels that the engine tries for a weight of few values."""
    density = int(weight.count_nonzero()) / weight.numel()
    return ("columns", "rows", "codes") if density >= MIN_DENSITY else ("columns", "rows")


def kernels(shapes: dict, seconds: float) -> None:
    print(
        "\n| layer | columns, ms | rows | codes | codes / the faster of the others | rounds |\n|"
        + " --- |" * 6
    )
    for name, (inputs, outputs, weights, activations) in shapes.items():
        dense = nn.Linear(inputs, outputs).eval().requires_grad_(False)
        sparse(dense.weight, weights, 15)
        xs = vectors(8, inputs, activations)
        contestants = [("dense", dense)]  # so that the weights are not in the cache each time
        for kernel in compressed_kernels(dense.weight):
            engine = nn.Sequential(copy.deepcopy(dense))
            contestants.append((kernel, compile(engine, kernels={"0": kernel}, threads=1)))
        taken = alternate(in_turn(contestants, xs), seconds, clock=time.thread_time)
        t = {key: 1e3 * value for key, value in medians(taken).items()}
        codes = "- | -"
        if "codes" in t:
            codes = f"{t['codes']:.3f} | {t['codes'] / min(t['columns'], t['rows']):.2f}"
        print(
            f"| {name} | {t['columns']:.3f} | {t['rows']:.3f} | {codes} | {len(taken['dense'])} |",
            flush=True,
        )


def density_map(side: int, densities: tuple, batches: tuple, seconds: float) -> None:
    print(
        "\ndense fp32 / compressed kernels (the fastest of `columns`, `rows` and `codes`), "
        f"{side} x {side}, 35% of activations\n\n| density | "
        + " | ".join(f"batch {b}" for b in batches)
        + " |\n|"
        + " --- |" * (1 + len(batches))
    )
    for density in densities:
        dense = nn.Linear(side, side).eval().requires_grad_(False)
        sparse(dense.weight, density, 15)
        cells = []
        for batch in batches:
            x = torch.cat(vectors(batch, side, 0.353))
            functions = {"dense": lambda x=x, dense=dense: dense(x)}
            compressed = compressed_kernels(dense.weight)
            for kernel in compressed:
                engine = compile(
                    nn.Sequential(copy.deepcopy(dense)), kernels={"0": kernel}, threads=1
                )
                functions[kernel] = lambda x=x, engine=engine: engine(x)
            t = medians(alternate(functions, seconds / 3, 5, time.thread_time))
            kernel = min(compressed, key=lambda name: t[name])
            cells.append(f"{t['dense'] / t[kernel]:.1f} {kernel}")
        print(f"| {density:.0%} | " + " | ".join(cells) + " |", flush=True)


def nets(networks: dict, seconds: float) -> None:
    columns = ("net", "engine ms", TORCH, ONNX, ONNX_INT8, "faster onnxruntime / engine", "rounds")
    print("\n| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for name, (build, x, density, values) in networks.items():
        model = build().eval()
        for weight_name, weight in model.named_parameters():
            if weight.ndim > 1 and "encoder" not in weight_name:
                sparse(weight.data, density, values)
        quantized = quantized_copy(model, torch.cat([x, x]))
        found = measure_latencies(
            model, model, x, quantized, seconds=seconds, clock=time.thread_time
        )
        t = {key: 1e3 * value for key, value in found.seconds.items()}
        best = min(t[ONNX], t.get(ONNX_INT8, t[ONNX]))
        cells = [f"{t[key]:.3f}" if key in t else "-" for key in (ENGINE, TORCH, ONNX, ONNX_INT8)]
        print(f"| {name} | " + " | ".join(cells) + f" | {best / t[ENGINE]:.2f} | {found.rounds} |")
        for row in found.layers:
            times = {kernel: round(us, 1) for kernel, us in row.microseconds.items()}
            print(f"|   {row.layer} | {row.kernel} {times} |", flush=True)
        for contestant, reason in found.missing.items():
            print(f"|   {contestant}: {reason} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parts = ["layers", "kernels", "map", "nets"]
    parser.add_argument("parts", nargs="*", choices=[*parts, []])
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    chosen = args.parts or parts
    number = 1 if args.quick else None
    seconds = 0.01 if args.quick else args.seconds
    import onnxruntime

    load = os.getloadavg()
    print(
        f"# The engine, {datetime.date.today()}\n\n{platform.machine()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}, onnxruntime "
        f"{onnxruntime.__version__}; load of {os.cpu_count()} cores at the start: "
        f"{load[0]:.1f}; command: python {' '.join(sys.argv)}"
    )
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with torch.inference_mode():
        if "layers" in chosen:
            layers(QUICK_LAYERS if args.quick else LAYERS, seconds)
        if "kernels" in chosen:
            kernels(QUICK_LAYERS if args.quick else LAYERS, seconds)
        if "map" in chosen:
            side = 64 if args.quick else SIDE
            density_map(side, DENSITIES[:number], BATCHES[:number], seconds)
        if "nets" in chosen:
            nets(dict(list(NETS.items())[:number]), seconds)
    print(f"\nLoad at the end: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
