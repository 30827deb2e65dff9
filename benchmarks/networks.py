"""Which networks of torchvision, timm and transformers work with which phases.

    pip install torchvision timm transformers onnx onnxruntime onnxscript
    python benchmarks/networks.py [--networks "timm*" BERT] [--phases train file] [--quick]

Each network, in a small configuration, is trained for two steps on random data in each phase. It is
then loaded again from the files of the run, which must give the loss that the run measured. A cell
of the table is "works"; "refused", if the experiment was rejected before the first step, with the
reason below; or "FAILS", if an error came later, or a result is wrong. Networks of packages that
are not installed are left out.
"""

import argparse
import importlib.util
import itertools
import math
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import trainer
from trainer.compress.select import weights
from trainer.data.tree import map_tensors
from trainer.errors import ConfigError, first_line
from trainer.messages import PhaseStarted
from trainer.phases import (
    EntropyPenalty,
    Phase,
    Prune,
    Quantize,
    Retrain,
    Share,
    StructuredPrune,
    Train,
)
from trainer.tasks import Classification, LanguageModel, Regression, Segmentation, Task

SAMPLES, BATCH, CLASSES, WORDS = 4, 2, 5, 50
ANY = ["unsupported"]  # Quantize leaves out what it cannot quantize


@dataclass
class Chain:
    """Phases that run one after another.

    Attributes:
        makes: The columns of the table that are right if the run is; if it is not, each of them is
            run by itself.
        phases: Makes the phases.
        file: Whether model.dcz is written.
        onnx: Whether model.onnx is written.
        optimizer: That of the run.
    """

    makes: tuple[str, ...]
    phases: Callable[[], list[Phase]]
    file: bool = False
    onnx: bool = False
    optimizer: dict[str, Any] | None = None


ADAM = {"_target_": "torch.optim.AdamW", "lr": 1e-3}
SINGLE = {
    "train": Chain(("train",), lambda: [Train(epochs=1)]),
    "prune": Chain(("prune",), lambda: [Prune(0.5, epochs=1)]),
    "retrain": Chain(("retrain",), lambda: [Prune(0.5, epochs=0), Retrain(epochs=1)]),
    "share": Chain(("share",), lambda: [Share(3, epochs=1)]),
    "file": Chain(("file",), lambda: [Share(3, epochs=0)], file=True),
    "quantize": Chain(("quantize",), lambda: [Quantize(exempt=ANY, epochs=1)]),
    "calibrate": Chain(("calibrate",), lambda: [Quantize(samples=4, exempt=ANY, epochs=0)]),
    "onnx int8": Chain(("onnx int8",), lambda: [Quantize(exempt=ANY, epochs=1)], onnx=True),
    "structured": Chain(("structured",), lambda: [StructuredPrune(0.8, epochs=1)]),
    "onnx": Chain(("onnx",), lambda: [Train(epochs=1)], onnx=True),
    "entropy": Chain(("entropy",), lambda: [EntropyPenalty(epochs=1)], optimizer=ADAM),
}
CHAINS = [
    Chain(
        ("train", "prune", "retrain", "share", "file"),
        lambda: [
            Train(epochs=1),
            Prune(0.5, epochs=1),
            Retrain(epochs=1),
            Share(3, epochs=1),
        ],
        file=True,
    ),
    Chain(
        ("quantize", "calibrate", "onnx int8"),
        lambda: [Quantize(samples=4, exempt=ANY, epochs=1)],
        onnx=True,
    ),
    Chain(("structured", "onnx"), lambda: [StructuredPrune(0.8, epochs=1)], onnx=True),
    SINGLE["entropy"],
]


@dataclass
class Network:
    """A network, and random samples for it.

    Attributes:
        model: As for `trainer.run`.
        inputs: Shape of an image or of other numbers; or the length of a text.
        task: The task.
        package: What it needs besides PyTorch.
        mask: Whether the model is called with input_ids and attention_mask.
        lr: The learning rate.
    """

    model: Any
    inputs: tuple[int, ...] = (3, 32, 32)
    task: Callable[[], Task] = Classification
    package: str | None = None
    mask: bool = False
    lr: float = 1e-3

    def batch(self, number: int) -> tuple[Any, Tensor]:
        """Inputs and targets of random samples."""
        if len(self.inputs) == 1 and self.task is not Regression:
            ids = torch.randint(1, WORDS, (number, *self.inputs))
            x: Any = {"input_ids": ids, "attention_mask": ids.ne(1).long()} if self.mask else ids
            text = isinstance(self.task(), LanguageModel)
            return x, ids if text else torch.randint(CLASSES, (number,))
        x = torch.randn(number, *self.inputs)
        if self.task is Regression:
            return x, torch.randn(number)
        space = self.inputs[1:] if self.task is Segmentation else ()
        return x, torch.randint(CLASSES, (number, *space))


class GRU(nn.Module):
    """A language model with a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.gru = nn.GRU(16, 32, 2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(32, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.out(self.gru(self.words(tokens))[0])
        return logits


class UNet(nn.Module):
    """Two levels, transposed convolutions and skip connections (arXiv:1505.04597)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            conv = nn.Conv2d(inputs, outputs, 3, padding=1)
            return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())

        sizes = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(itertools.starmap(block, zip([3, *sizes], sizes, strict=False)))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * n, n, 2, 2) for n in sizes[-2::-1])
        self.merge = nn.ModuleList(block(2 * n, n) for n in sizes[-2::-1])
        self.out = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        levels = []
        for n, block in enumerate(self.down):
            x = block(nn.functional.max_pool2d(x, 2) if n else x)
            levels.append(x)
        for up, merge, level in zip(self.up, self.merge, levels[-2::-1], strict=True):
            x = merge(torch.cat([up(x), level], 1))
        logits: Tensor = self.out(x)
        return logits


def regression() -> nn.Module:
    """A network for one number."""
    return nn.Sequential(
        nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 1)
    )


def small(kind: str) -> nn.Module:
    """A network of torchvision with few layers."""
    from torchvision.models import convnext, regnet, resnet, vgg

    if kind == "VGG":
        layers = vgg.make_layers([16, "M", 32, "M", 64], batch_norm=True)
        model = vgg.VGG(layers, CLASSES, init_weights=False)
        model.classifier = nn.Linear(64 * 7 * 7, CLASSES)  # without 119 million weights
        return model
    if kind == "ConvNeXt":
        blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 1)]
        return convnext.ConvNeXt(blocks, stochastic_depth_prob=0.1, num_classes=CLASSES)
    if kind == "RegNet":
        sizes = regnet.BlockParams.from_init_params(4, 16, 20.0, 2.2, 8, se_ratio=0.25)
        return regnet.RegNet(sizes, CLASSES)
    return resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], CLASSES)


def inception() -> nn.Module:
    """timm's Inception v3 with the running statistics of a batch.

    With those of a fresh model, a mean of 0 and a variance of 1, each layer multiplies its inputs,
    and the outputs are about 1e9 before any training.
    """
    import timm

    model: nn.Module = timm.create_model("inception_v3", num_classes=CLASSES)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 96, 96))
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return model


def transformer(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A network of transformers, randomly initialized."""

    def make() -> nn.Module:
        import transformers

        return getattr(transformers, name)(getattr(transformers, config)(**settings))

    return make


def vision(name: str, **settings: Any) -> dict[str, Any]:
    """Settings of a network of torchvision."""
    return {"_target_": f"torchvision.models.{name}", "num_classes": CLASSES, **settings}


def image_model(name: str, **settings: Any) -> dict[str, Any]:
    """Settings of a network of timm."""
    return {"_target_": "timm.create_model", "model_name": name, "num_classes": CLASSES, **settings}


def networks() -> Iterator[tuple[str, Network]]:
    """All networks by name."""
    swin = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]}
    dense = {"growth_rate": 8, "block_config": [2, 2, 2]}
    own = {
        "regression": Network(regression, (6,), Regression),
        "U-Net": Network(UNet, task=Segmentation),
        "GRU": Network(GRU, (12,), partial(LanguageModel, shift=True)),
        "LSTM": Network(
            {"_target_": "trainer.models.LSTMLanguageModel", "vocabulary": WORDS, "hidden": 32},
            (12,),
            partial(LanguageModel, shift=True),
        ),
    }
    yield from own.items()
    torchvision: dict[str, Network] = {
        "ResNet": Network(partial(small, kind="ResNet")),
        "VGG": Network(partial(small, kind="VGG")),
        "Inception v3": Network(vision("inception_v3", init_weights=False), (3, 299, 299)),
        "GoogLeNet": Network(vision("googlenet", init_weights=False), (3, 64, 64)),
        "MobileNet v3": Network(vision("mobilenet_v3_small", width_mult=0.25)),
        # In evaluation it gives NaN for smaller images.
        "EfficientNet-B0": Network(vision("efficientnet_b0"), (3, 64, 64)),
        "DenseNet": Network(vision("DenseNet", num_init_features=16, **dense)),
        "RegNet": Network(partial(small, kind="RegNet")),
        "MNASNet": Network(vision("MNASNet", alpha=0.25), lr=1e-5),  # diverges at 1e-3
        "ConvNeXt": Network(partial(small, kind="ConvNeXt")),
        "ViT": Network(
            vision(
                "VisionTransformer",
                image_size=32,
                patch_size=8,
                num_layers=2,
                num_heads=4,
                hidden_dim=32,
                mlp_dim=64,
            )
        ),
        "Swin": Network(vision("SwinTransformer", patch_size=[4, 4], window_size=[4, 4], **swin)),
        "LR-ASPP": Network(
            vision("segmentation.lraspp_mobilenet_v3_large", weights_backbone=None),
            task=Segmentation,
        ),
    }
    timm: dict[str, Network] = {
        "ResNet": Network(image_model("test_resnet")),
        "VGG-11": Network(image_model("vgg11", mlp_ratio=0.01)),
        "Inception v3": Network(inception, (3, 96, 96), lr=1e-5),  # diverges at 1e-3
        "MobileNet v3": Network(image_model("mobilenetv3_small_050", drop_rate=0.2)),
        "EfficientNet": Network(image_model("test_efficientnet", drop_path_rate=0.1)),
        "DenseNet": Network(image_model("densenet121", **dense)),
        "RegNet": Network(image_model("regnetx_002")),
        "MNASNet": Network(image_model("mnasnet_small")),
        "ConvNeXt": Network(image_model("test_convnext", drop_path_rate=0.1)),
        "ViT": Network(image_model("test_vit", img_size=32, drop_path_rate=0.1)),
        "Swin": Network(
            image_model(
                "swin_tiny_patch4_window7_224",
                img_size=32,
                window_size=4,
                drop_path_rate=0.1,
                **swin,
            )
        ),
    }
    size: dict[str, Any] = {"vocab_size": WORDS, "num_labels": CLASSES}
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = partial(LanguageModel, shift=True)
    bert = transformer(
        "BertForSequenceClassification", "BertConfig", intermediate_size=64, **size, **layers
    )
    transformers = {
        "BERT": Network(bert, (12,)),
        "BERT with mask": Network(bert, (12,), mask=True),
        "GPT-2": Network(
            transformer(
                "GPT2LMHeadModel",
                "GPT2Config",
                n_embd=32,
                n_layer=2,
                n_head=4,
                vocab_size=WORDS,
                bos_token_id=0,
                eos_token_id=0,
            ),
            (12,),
            words,
        ),
        "Llama": Network(
            transformer(
                "LlamaForCausalLM",
                "LlamaConfig",
                intermediate_size=64,
                num_key_value_heads=2,
                vocab_size=WORDS,
                **layers,
            ),
            (12,),
            words,
        ),
    }
    families = {"torchvision": torchvision, "timm": timm, "transformers": transformers}
    for package, found in families.items():
        for name, network in found.items():
            network.package = package
            yield f"{package} {name}", network


class Watch:
    """Notes whether a phase has begun."""

    def __init__(self) -> None:
        self.started = False

    def on(self, message: Any) -> None:
        self.started |= isinstance(message, PhaseStarted)

    def close(self) -> None:
        pass


def attempt(network: Network, chain: Chain, folder: Path) -> str:
    """What becomes of a network in a chain: works, refused: REASON, or FAILS: REASON."""
    watch = Watch()
    torch.manual_seed(0)
    data = {part: network.batch(SAMPLES) for part in ("train", "validation", "test")}
    try:
        result = trainer.run(
            model=network.model,
            data=data,
            task=network.task(),
            phases=chain.phases(),
            optimizer=chain.optimizer,
            lr=network.lr,
            batch_size=BATCH,
            artifact={"make": chain.file, "max_seconds": 0.5},
            export={"onnx": chain.onnx},
            cluster={"backend": "inline", "workers": 1},
            logger={"watch": watch},
            progress=False,
            out=folder / "run",
        )
        problem = wrong(result, network, chain, data["test"])
    except ConfigError as error:
        return f"{'FAILS late' if watch.started else 'refused'}: {first_line(error)}"
    except Exception as error:
        traceback.print_exc()
        return f"FAILS: {type(error).__name__}: {first_line(error)}"
    return f"FAILS: {problem}" if problem else "works"


def nearly(tensor: Tensor) -> Tensor:
    """Numbers that differ from those of a tensor as by rounding; integers stay."""
    if not tensor.is_floating_point():
        return tensor
    return tensor * (1 + 1e-6 * torch.randn_like(tensor))


@torch.no_grad()
def wrong(result: Any, network: Network, chain: Chain, test: tuple[Any, Tensor]) -> str | None:
    """What is wrong with a result; None: nothing."""
    task, (inputs, targets) = network.task(), test
    units = task.units(targets)

    def loss_of(inputs: Any) -> float:  # of the model from the file
        output = task.call(result.model, inputs)
        return float(task.evaluation_loss(output, targets, units) / units)

    loss, measured = loss_of(inputs), result.metrics["loss"]
    # An untrained deep network of 8-bit integers magnifies differences by rounding.
    changed = [loss_of(map_tensors(nearly, inputs)) for _ in range(5)]
    allowed = max(1e-4, *(abs(other - loss) for other in changed))
    if not math.isclose(loss, measured, rel_tol=1e-3, abs_tol=allowed):
        return f"the loss of the loaded model is {loss}, the run measured {measured}"
    kinds = {phase["kind"]: phase for phase in result.phases}
    last = result.phases[-1]
    if "prune" in kinds and last["sparsity"] < 0.49:
        return f"the sparsity is {last['sparsity']}"
    if "share" in kinds:
        for name, places in weights(result.model).items():
            if (values := len(places[0].value.unique())) > 9:
                return f"{name} has {values} values"
    if "structured_prune" in kinds:
        fresh = result.experiment.build_model()
        if last["parameters"] >= sum(p.numel() for p in fresh.parameters()):
            return "nothing was removed"
    scale = max(1.0, float(task.prediction(task.call(result.model, inputs)).abs().max()))
    for made in result.summary.get("onnx", []):
        if not made["difference"] < scale * (1e-2 if made["name"] == "fp32" else 1):
            return f"{made['name']} in onnxruntime differs by {made['difference']}"
    return None


def cells(network: Network, wanted: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The columns of the table, and what becomes of the network there."""
    for chain in CHAINS:
        if not set(chain.makes) & set(wanted):
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = attempt(network, chain, Path(folder))
        for name in chain.makes:
            if name in wanted:
                if found != "works" and len(chain.makes) > 1:
                    with tempfile.TemporaryDirectory() as folder:
                        yield name, attempt(network, SINGLE[name], Path(folder))
                else:
                    yield name, found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--networks", nargs="+", default=["*"], help="patterns of names")
    parser.add_argument("--phases", nargs="+", default=list(SINGLE), choices=SINGLE)
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    args = parser.parse_args()
    if args.quick:
        args.networks, args.phases = ["regression"], ["train", "file"]
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    missing = {
        name
        for name in ("torchvision", "timm", "transformers")
        if importlib.util.find_spec(name) is None
    }
    reasons: dict[str, str] = {}  # by their marks
    rows, failures, begin = [], 0, time.perf_counter()
    columns = [name for chain in CHAINS for name in chain.makes if name in args.phases]
    for name, network in networks():
        if network.package in missing or not any(fnmatch(name, p) for p in args.networks):
            continue
        row = []
        for phase, text in cells(network, columns):
            found, _, reason = text.partition(": ")
            failures += found.startswith("FAILS")
            if reason:
                mark = next((m for m, r in reasons.items() if r == reason), str(len(reasons) + 1))
                reasons[mark] = reason
                found += f" ({mark})"
            print(f"{name}, {phase}: {found} {reason}", file=sys.stderr, flush=True)
            row.append(found)
        rows.append(f"| {name} | {' | '.join(row)} |")
    packages = ", ".join(
        f"{package} {version(package)}"
        for package in ("torchvision", "timm", "transformers")
        if package not in missing
    )
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, {packages or 'no others'};"
        f" {time.perf_counter() - begin:.0f} s; command: python {' '.join(sys.argv)}\n"
    )
    print(f"| network | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    print("\n".join(rows))
    if reasons:
        print("\n" + "\n".join(f"{mark}. {reason}" for mark, reason in reasons.items()))
    for package in sorted(missing):
        print(f"\n{package} is not installed: its networks were left out.")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
