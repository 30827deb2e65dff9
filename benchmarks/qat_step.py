"""Time of a training step with our phases quantize and entropy, torchao's PT2E, and without any.

    pip install torchao==0.18.0   # without it, that row is left out
    python benchmarks/qat_step.py [--net LeNet-5] [--steps 100] [--repeats 9] [--quick]

LeNet-5 or ResNet-20, batch 64, one thread, fused SGD, the same images again and again. All take
turns, in an order that rotates; the first turn of each is not counted. The table shows medians over
turns; a ratio is the median of the ratios within each turn, to plain training in fp32 and in the
same precision.

    quantize  what trainer.phases.Quantize makes of the net, and its after_step (8-bit weights per
              channel, 8-bit inputs of layers with a moving average of their range)
    entropy   what trainer.phases.EntropyPenalty makes of it, its penalty and after_step
    torchao   prepare_qat_pt2e with X86InductorQuantizer's default QAT configuration, run as it is
"""

import argparse
import datetime
import importlib.util
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.models import LeNet5, ResNetCifar
from trainer.phases import EntropyPenalty, Phase, Quantize

BATCH = 64
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # and the size of an image
    "LeNet-5": (LeNet5, (1, 28, 28)),
    "ResNet-20": (ResNetCifar, (3, 32, 32)),
}
Turn = Callable[[int], float]  # steps -> seconds a step


def contestant(
    model: nn.Module, size: tuple[int, ...], bf16: bool = False, phase: Phase | None = None
) -> Turn:
    world = World.single(torch.device("cpu"))
    torch.manual_seed(1)
    layout = torch.channels_last if bf16 else torch.contiguous_format
    model.train().to(memory_format=layout)
    images = torch.randn(BATCH, *size).contiguous(memory_format=layout)
    targets = torch.randint(10, (BATCH,))
    if phase is not None:
        phase.enter(model, world)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, fused=True)

    def turn(steps: int) -> float:
        started = time.perf_counter()
        for step in range(steps):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
                loss = F.cross_entropy(model(images).float(), targets)
            if phase is not None and (penalty := phase.penalty(model)) is not None:
                loss = loss + penalty
            loss.backward()
            optimizer.step()
            if phase is not None:
                phase.after_step(model, world, step + 1, steps)
        return (time.perf_counter() - started) / steps

    return turn


def pt2e(model: nn.Module, size: tuple[int, ...]) -> nn.Module:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_qat=True))
    example = (torch.randn(BATCH, *size),)
    exported = torch.export.export(model.train(), example).module()
    model = prepare_qat_pt2e(exported, quantizer)
    move_exported_model_to_train(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--net", default="LeNet-5", choices=[*NETS])
    parser.add_argument("--steps", type=int, default=100, help="in a turn")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.repeats = 1, 1
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    build, size = NETS[args.net]
    settings = FitConfig(epochs=1)
    phases: dict[str, Callable[[], Phase | None]] = {
        "plain": lambda: None,
        "quantize": lambda: Quantize(fit=settings),
        "entropy": lambda: EntropyPenalty(vectors=True, fit=settings),
    }
    contestants = {
        f"{name}, {'bf16 + channels_last' if bf16 else 'fp32'}": contestant(
            build(), size, bf16, phase()
        )
        for name, phase in phases.items()
        for bf16 in (False, True)
    }
    versions = f"torch {torch.__version__}"
    if importlib.util.find_spec("torchao"):
        import torchao

        contestants["torchao PT2E QAT, fp32"] = contestant(pt2e(build(), size), size)
        versions += f", torchao {torchao.__version__}"
    else:
        versions += ", without torchao, which is not installed"
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(args.repeats + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = contestants[name](args.steps)
            times[name] += [seconds] * (number > 0)
    print(
        f"# Training step, {datetime.date.today()}\n\n"
        f"{platform.machine()}, Python {platform.python_version()}, {versions}; "
        f"command: python {' '.join(sys.argv)}\n\n"
        "| step | ms | of plain fp32 | of plain | min - max | n |\n|" + " --- |" * 6
    )
    for name, column in times.items():
        plain = "plain, fp32", f"plain, {name.partition(', ')[2]}"
        ratios = [
            statistics.median(a / b for a, b in zip(column, times[base], strict=True))
            for base in plain
        ]
        median, least, most = (1e3 * of(column) for of in (statistics.median, min, max))
        print(
            f"| {name} | {median:.2f} | {ratios[0]:.2f} | {ratios[1]:.2f} | {least:.2f} - "
            f"{most:.2f} | {args.repeats} |"
        )


if __name__ == "__main__":
    main()
