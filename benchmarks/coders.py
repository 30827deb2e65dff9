"""Bytes and time of the coders on the shared layers of trained models, and of VGG-16's size.

    python benchmarks/coders.py model.dcz [more.dcz ...] [--nncodec PYTHON]
    python benchmarks/coders.py --vgg16

Of each model the layers with a codebook are taken, as matrices of levels (0 for a pruned weight,
else the number of its cluster). All coders get the same levels, without codebooks, biases, norms.
--nncodec names the Python of an environment that has the reference software of the standard
ISO/IEC 15938-17 (pip install nncodec==2.1.3); it codes the levels as integers, negative centroids
as negative numbers, losslessly, without dependent quantization, as nothing is left to quantize.

--vgg16 codes random layers of VGG-16's shapes with Han's densities (7.5% in all) and 32 clusters,
and shows seconds and the peak memory of a process that only decodes.
"""

import argparse
import lzma
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import numpy as np

from trainer import artifact
from trainer.compress.codebooks import codebook_of
from trainer.compress.coding import decode_layer, encode_layer
from trainer.models import VGG16

HAN = [0.58, 0.22, 0.34, 0.36, 0.53, 0.24, 0.42, 0.32, 0.27, 0.34, 0.35, 0.29, 0.36]
HAN += [0.04, 0.04, 0.23]  # densities of VGG-16's layers, NIPS 2015, table 5

NNCODEC = """
import sys, time
import numpy as np
from nncodec import nnc
levels = dict(np.load(sys.argv[1]))
start = time.perf_counter()
out = sys.argv[1] + ".nnc"
stream = nnc.compress(levels, return_bitstream=True, use_dq=False, bitstream_path=out)
encoded = time.perf_counter()
back = nnc.decompress(stream)
decoded = time.perf_counter()
assert all(np.array_equal(back[k], levels[k]) for k in levels), "not lossless"
print(len(stream), encoded - start, decoded - encoded)
"""


def shared_layers(path):
    """(name, levels in the weight's shape, clusters, negative ones) of layers with a codebook."""
    for name, tensor in artifact.load(path).items():
        book = codebook_of(tensor) if tensor.ndim > 1 else None
        if book is not None:
            levels = book.codes.numpy().astype(np.uint16)
            yield name, levels, len(book.values), int((book.values < 0).sum())


def timed(work, *args):
    """(result, seconds), the best of three."""
    best = None
    for _ in range(3):
        start = time.perf_counter()
        result = work(*args)
        seconds = time.perf_counter() - start
        best = seconds if best is None else min(best, seconds)
    return result, best


def ours(layers, coder):
    def encode():
        return [encode_layer(x, x.shape, k, n, coder) for _, x, k, n in layers]

    blobs, writing = timed(encode)

    def decode():
        return [
            decode_layer(b, x.shape, k, n) for b, (_, x, k, n) in zip(blobs, layers, strict=True)
        ]

    back, reading = timed(decode)
    assert all(np.array_equal(b, x) for b, (_, x, _, _) in zip(back, layers, strict=True))
    return sum(map(len, blobs)), writing, reading


def general(layers, compress, decompress):
    raw = [x.astype(np.uint8 if k < 256 else np.uint16).tobytes() for _, x, k, _ in layers]
    packed, writing = timed(lambda: [compress(r) for r in raw])
    _, reading = timed(lambda: [decompress(p) for p in packed])
    return sum(map(len, packed)), writing, reading


def standard(layers, python):
    signed = {}
    for name, x, _, n in layers:
        number = x.astype(np.int32)
        signed[name] = np.where(x == 0, 0, np.where(x <= n, number - n - 1, number - n))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "levels.npz"
        np.savez(file, **signed)
        said = subprocess.run(
            [python, "-c", NNCODEC, str(file)], capture_output=True, text=True, check=True
        ).stdout.split()
    return int(said[-3]), float(said[-2]), float(said[-1])


def compare(path, python):
    layers = list(shared_layers(path))
    rows = {name: ours(layers, name) for name in ("auto", "context", "columns", "huffman", "ans")}
    rows["zlib -9"] = general(layers, lambda r: zlib.compress(r, 9), zlib.decompress)
    rows["lzma -9e"] = general(
        layers, lambda r: lzma.compress(r, preset=9 | lzma.PRESET_EXTREME), lzma.decompress
    )
    if python:
        rows["nncodec"] = standard(layers, python)
    least = rows["auto"][0]
    print(f"\n{path}: {sum(x.size for _, x, _, _ in layers):,} weights")
    print("| coder | bytes | to ours | encode s | decode s |\n| --- | --- | --- | --- | --- |")
    for name, (size, writing, reading) in rows.items():
        print(f"| {name} | {size:,} | {size / least:.2f} | {writing:.3f} | {reading:.3f} |")


def vgg16(folder):
    """Write random coded layers to `folder`; seconds and bytes."""
    import torch

    with torch.device("meta"):
        shapes = [tuple(p.shape) for p in VGG16(classes=1000).parameters() if p.ndim > 1]
    chance = np.random.default_rng(0)
    seconds = size = total = 0
    for number, (shape, density) in enumerate(zip(shapes, HAN, strict=True)):
        levels = np.zeros(int(np.prod(shape)), np.uint16)
        kept = chance.random(levels.size, np.float32) < density
        # Clusters as frequent as those of a Laplacian without its middle.
        drawn = np.minimum(chance.geometric(0.15, int(kept.sum())), 16)
        levels[kept] = np.where(chance.random(len(drawn)) < 0.5, 17 - drawn, 16 + drawn)
        start = time.perf_counter()
        blob = encode_layer(levels, shape, 32, 16)
        seconds += time.perf_counter() - start
        size, total = size + len(blob), total + levels.size
        (folder / f"{number:02d}").write_bytes(blob)
        np.save(folder / f"{number:02d}.shape.npy", shape)
    return total, size, seconds


def memory(what):
    """Bytes of this process, as Linux counts them: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def decode_folder(folder):
    """In a process of its own: decode all layers to dense float32 weights; seconds, peak bytes."""
    small = encode_layer(np.eye(8, dtype=np.uint16), (8, 8), 32, 16, "huffman")
    decode_layer(small, (8, 8), 32, 16)  # compiled
    table = np.linspace(-1, 1, 33, dtype=np.float32)
    weights = []
    before = memory("VmRSS")
    start = time.perf_counter()
    for file in sorted(folder.glob("[0-9][0-9]")):
        shape = tuple(np.load(f"{file}.shape.npy"))
        weights.append(table[decode_layer(file.read_bytes(), shape, 32, 16)])
    seconds = time.perf_counter() - start
    print(seconds, memory("VmHWM") - before, sum(w.nbytes for w in weights))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="model.dcz")
    parser.add_argument("--nncodec", metavar="PYTHON")
    parser.add_argument("--vgg16", action="store_true")
    parser.add_argument("--decode", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        decode_folder(Path(options.decode))
        return
    for path in options.files:
        compare(path, options.nncodec)
    if options.vgg16:
        with tempfile.TemporaryDirectory() as folder:
            total, size, writing = vgg16(Path(folder))
            said = subprocess.run(
                [sys.executable, __file__, "--decode", folder],
                capture_output=True, text=True, check=True,
            ).stdout.split()  # fmt: skip
        reading, peak, dense = map(float, said)
        print(f"VGG-16's layers: {total:,} weights, {size:,} bytes, {4 * total / size:.1f}x")
        print(f"encoded in {writing:.1f} s, decoded in {reading:.1f} s")
        print(f"peak of decoding: {peak / dense:.2f} of the dense weights' {dense / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
