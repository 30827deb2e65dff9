"""Rounding a trained LeNet-5 after training: our files beside bit-streams of nncodec.

    python -m trainer +experiment=lenet5 cluster=inline cluster.threads=1 hydra.run.dir=RUN
    python benchmarks/rounding.py RUN/model.safetensors [--entropy 1:0.1 1:0.1:trellis]
        [--nncodec OTHER_VENV/bin/python 1:0:0 1:1:0]

Each row is one file, decoded: its bytes, the relative error of the logits on the test images
(norm of the difference over norm of the logits), and the test accuracy. The phase entropy_round
looks at 256 training images; settings are STEP:RATE[:trellis]. nncodec's are STEP:DEPENDENT:LAMBDA
(nncodec_side.py), and it sees weights alone.
"""

import argparse
import copy
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer import artifact
from trainer.data import mnist
from trainer.engine.world import World
from trainer.models import LeNet5
from trainer.phases import EntropyRound

_ENTROPY = ["0.5:0.1", "0.5:0.1:trellis", "1:0.1", "1:0.1:trellis"]
_SAMPLES = 256  # training images
_BATCH = 64


def ours(model: nn.Module, inputs: list[Tensor], settings: str) -> tuple[dict[str, Tensor], int]:
    """The decoded weights of the file that entropy_round leaves, and its bytes."""
    found, world = copy.deepcopy(model), World.single(torch.device("cpu"))
    step, rate, *trellis = settings.split(":")
    phase = EntropyRound(step=float(step), rate=float(rate), trellis=bool(trellis))
    phase.observe(found, world, inputs)
    phase.enter(found, world)
    phase.leave(found)
    content = artifact.encode(found.state_dict())
    return artifact.loads(content), len(content)


def by_nncodec(
    state: dict[str, Tensor], python: str, settings: str
) -> tuple[dict[str, Tensor], int]:
    """The weights that nncodec decodes, and the bytes of its bit-stream."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        save_file(state, source)
        side = [python, Path(__file__).parent / "nncodec_side.py", source, target]
        run = subprocess.run([*side, *settings.split(":")], check=True, capture_output=True)
        return load_file(target), int(run.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("weights", type=Path, nargs="?", help="model.safetensors of a run")
    parser.add_argument("--entropy", nargs="*", default=_ENTROPY, metavar="STEP:RATE[:trellis]")
    parser.add_argument("--nncodec", nargs="*", default=[], metavar="PYTHON STEP:DEPENDENT:LAMBDA")
    parser.add_argument("--quick", action="store_true", help="random weights, 100 images")
    args = parser.parse_args()
    model = LeNet5().eval()
    if args.weights:
        model.load_state_dict(load_file(args.weights))
    elif not args.quick:
        parser.error("the weights of a run, or --quick")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = mnist(test=100 if args.quick else None)
    batches = data.train.batches(torch.arange(_SAMPLES).split(_BATCH), None)
    inputs = [images for images, _ in batches]
    rows = {f"entropy_round {name}": partial(ours, model, inputs, name) for name in args.entropy}
    for settings in args.nncodec[1:]:
        rows[f"nncodec {settings}"] = partial(by_nncodec, state, args.nncodec[0], settings)
    ((images, targets),) = data.test.batches([torch.arange(len(data.test))], None)
    with torch.no_grad():
        expected = model(images)
        print(f"dense: {float((expected.argmax(1) == targets).float().mean()):.2%}")
        print("| file | bytes | error of the logits | accuracy % |")
        print("| --- | --- | --- | --- |")
        for name, make in rows.items():
            weights, size = make()
            model.load_state_dict(weights)
            found = model(images)
            model.load_state_dict(state)
            error = float((found - expected).norm() / expected.norm())
            accuracy = 100 * float((found.argmax(1) == targets).float().mean())
            print(f"| {name} | {size:,} | {error:.4f} | {accuracy:.2f} |", flush=True)


if __name__ == "__main__":
    main()
