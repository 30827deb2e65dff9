"""The layer coders beside the standard's reference codec, zlib and lzma: bytes and seconds.

    python benchmarks/coders.py RUN/model.safetensors ... [--density fc1=0.02 fc2=0.05]
        [--clusters 16] [--nncodec OTHER_VENV/bin/python]
    python benchmarks/coders.py --vgg16
    python benchmarks/coders.py --quick

Takes the tensors with two or more dimensions of each file, pruned to their density (by default as
they are). One with few distinct values (trainer.compress.codebooks.distinct_values) is shared as it
is, another by k-means with --clusters, linear initialisation. Levels only: codebooks, names and
biases are in no column.

    ours        encode_layer, decode_layer, every blob decoded and compared
    Huffman, ANS   the same with that coder alone
    nncodec     the CABAC of ISO/IEC 15938-17 in an environment that has nncodec 2.1.3, on the same
                levels as signed integers, smallest of its scan orders, profiles and three unary
                lengths; its seconds are those of the best one, its headers are not counted
    zlib, lzma  levels of a byte each (two above 255), level 9

--vgg16 writes a state_dict of VGG-16, 138M weights of which 7.5% survive in 32 clusters, as a .dcz
file and loads it again, each in a process of its own: seconds, and the most memory it held.

--quick does both with a small net of random weights, to see that it runs.
"""

import argparse
import datetime
import io
import lzma
import math
import multiprocessing
import platform
import re
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer import artifact
from trainer.compress.codebooks import cluster, codebook_of
from trainer.compress.coding import decode_layer, encode_layer
from trainer.models import VGG16, LeNet300

Levels = NDArray[np.uint16]
THEIRS = """
import io, sys, time
import numpy as np
from nncodec.extensions.deepCABAC import Decoder, Encoder, HdspMode
off = [HdspMode.AlwaysOff, np.zeros(2, np.int8)]
q = np.load(io.BytesIO(sys.stdin.buffer.read())).astype(np.int32)
skip = np.array([not row.any() for row in q], np.int32)
best = None
for scan in range(5):
    for unary in (4, 11, 17):
        for profile in (0, 1):
            start = time.perf_counter()
            coder = Encoder()
            coder.initCtxModels(unary, 1)
            coder.encodeLayer(q, 0, scan, profile, 0, profile, skip, *off, 0, 0)
            data = coder.finish()
            encode = time.perf_counter() - start
            if best is None or data.size < best[0]:
                out = np.zeros_like(q)
                start = time.perf_counter()
                coder = Decoder()
                coder.setStream(data)
                coder.initCtxModels(unary)
                coder.decodeLayer(out, 0, scan, profile, 0, *off, 0, 0)
                decode = time.perf_counter() - start
                if (out == q).all():  # skipped rows do not survive every scan order
                    best = data.size, encode, decode
print(*best)
"""


def shared(weight: Tensor, density: float, clusters: int) -> tuple[Levels, int, int]:
    """Levels of one weight, the number of clusters, and how many of them are negative."""
    weight = weight.clone()
    flat = weight.flatten()
    kept = round(density * flat.numel())
    if kept < flat.count_nonzero():
        flat[flat.abs().argsort(descending=True, stable=True)[kept:]] = 0
        weight = flat.view(weight.shape)
    book = codebook_of(weight) or cluster(weight, clusters)
    levels = book.codes.numpy().astype(np.uint16)
    return levels, max(1, len(book.values)), int((book.values < 0).sum())


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def ours(levels: Levels, clusters: int, negatives: int, coder: str) -> tuple[int, float, float]:
    shape = levels.shape
    blob, encode = timed(lambda: encode_layer(levels, shape, clusters, negatives, coder))
    back, decode = timed(lambda: decode_layer(blob, shape, clusters, negatives))
    if not np.array_equal(back, levels):
        raise SystemExit("decoded to other levels")
    return len(blob), encode, decode


def general(levels: Levels, coder: Any) -> tuple[int, float, float]:
    raw = levels.astype(np.uint8 if levels.max(initial=0) < 256 else np.uint16).tobytes()
    level: dict[str, int] = {"preset": 9} if coder is lzma else {"level": 9}
    packed, encode = timed(lambda: coder.compress(raw, **level))
    return len(packed), encode, timed(lambda: coder.decompress(packed))[1]


def theirs(python: str, levels: Levels, negatives: int) -> tuple[int, float, float]:
    signed = levels.astype(np.int32)
    signed = np.where(signed > negatives, signed - negatives, signed - negatives - 1)
    buffer = io.BytesIO()
    np.save(buffer, np.where(levels == 0, 0, signed))
    run = subprocess.run(
        [python, "-c", THEIRS], input=buffer.getvalue(), capture_output=True, check=True
    )
    size, encode, decode = run.stdout.split()
    return int(size), float(encode), float(decode)


def compare(path: Path, densities: dict[str, float], clusters: int, python: str | None) -> None:
    """Print the rows of one file."""
    sums: dict[str, Any] = {}
    for name, weight in load_file(path).items():
        if weight.ndim < 2:
            continue
        density = densities.get(name.removesuffix(".weight"), 1.0)
        levels, k, negatives = shared(weight, density, clusters)
        rows = {
            "ours": ours(levels, k, negatives, "auto"),
            "Huffman": ours(levels, k, negatives, "huffman"),
            "ANS": ours(levels, k, negatives, "ans"),
            "zlib": general(levels, zlib),
            "lzma": general(levels, lzma),
        }
        if python:
            rows["nncodec"] = theirs(python, levels, negatives)
        shape = "x".join(map(str, levels.shape))
        show(f"{name} {shape}, {np.count_nonzero(levels)} in {k}", rows)
        for coder, row in rows.items():
            sums[coder] = np.add(sums.get(coder, 0), row)
    show(f"**{path.parent.name}/{path.name}**", sums)


def show(what: str, rows: dict[str, Any]) -> None:
    for coder, (size, encode, decode) in rows.items():
        of = size / rows["nncodec"][0] if "nncodec" in rows else float("nan")
        line = f"| {what} | {coder} | {size:,.0f} | {of:.3f} | {encode:.3f} | {decode:.3f} |"
        print(line, flush=True)


def vgg16() -> None:
    """Seconds and memory of a whole model, written and loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.dcz"
        for job, arguments in ((write, (path, VGG16)), (read, (path,))):
            process = multiprocessing.get_context("spawn").Process(target=job, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


def weights(net: type[nn.Module]) -> dict[str, Tensor]:
    """A state_dict of random numbers: weights pruned and shared, biases dense."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in net().state_dict().items()}
    rng = np.random.default_rng(0)
    values = np.sort(rng.normal(0, 0.02, 32)).astype(np.float16).astype(np.float32)
    made = {}
    for name, shape in shapes.items():
        flat = np.zeros(math.prod(shape), np.float32)
        for part in np.array_split(flat, max(1, flat.size >> 20)):  # all at once takes more memory
            kept = rng.random(part.size, dtype=np.float32) < (0.075 if len(shape) > 1 else 1)
            places = rng.normal(15.5, 6, int(kept.sum())).round().clip(0, 31)
            part[kept] = values[places.astype(int)]
        made[name] = torch.from_numpy(flat).view(shape)
    return made


def write(path: Path, net: type[nn.Module]) -> None:
    artifact.encode({"w": torch.eye(9)})  # compiled before the clock starts
    before = peak()
    state = weights(net)
    dense = sum(tensor.numel() for tensor in state.values()) * 4 / 2**20
    content, seconds = timed(lambda: artifact.encode(state))
    path.write_bytes(content)
    print(
        f"{dense:.0f} MiB of FP32\nencode {seconds:.1f} s to {len(content):,} bytes, peak "
        f"{peak():.0f} MiB of the process, the weights included ({before:.0f} before them)",
        flush=True,
    )


def read(path: Path) -> None:
    artifact.loads(artifact.encode({"w": torch.eye(9)}))
    before = peak()
    _, seconds = timed(lambda: artifact.load(path))
    print(
        f"load {seconds:.1f} s, peak {peak():.0f} MiB of the process ({before:.0f} before)",
        flush=True,
    )


def peak() -> float:
    """The most MiB this process held. (ru_maxrss would count what the parent held.)"""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--clusters", type=int, default=16, help="for weights not shared yet")
    parser.add_argument("--density", nargs="*", default=[], metavar="LAYER=FRACTION")
    parser.add_argument("--nncodec", metavar="PYTHON", help="an interpreter that has nncodec")
    parser.add_argument("--vgg16", action="store_true")
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    print(
        f"# Coders, {datetime.date.today()}\n\n{platform.machine()}, Python "
        f"{platform.python_version()}; command: python {' '.join(sys.argv)}\n",
        flush=True,
    )
    if args.vgg16:
        vgg16()
    if args.quick:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / "model.dcz", LeNet300)
            read(Path(folder) / "model.dcz")
            path = Path(folder) / "model.safetensors"
            save_file({"fc.weight": torch.randn(20, 20)}, path)
            compare(path, {"fc": 0.5}, args.clusters, args.nncodec)
    if args.files:
        decode_layer(encode_layer(np.eye(9), (9, 9), 2), (9, 9), 2)  # compiled beforehand
        print("| weights | coder | bytes | of nncodec | encode s | decode s |\n|" + " --- |" * 6)
    densities = {name: float(value) for name, _, value in (d.partition("=") for d in args.density)}
    for path in args.files:
        compare(path, densities, args.clusters, args.nncodec)


if __name__ == "__main__":
    main()
