"""AlexNet's fully connected layers, from pruning to accelerators: one chain, one table.

    python benchmarks/alexnet_layers.py [--quick]

Random weights of the sizes of Alex-6, Alex-7 and Alex-8 are pruned by magnitude to the densities
that Han et al. (NIPS 2015, arXiv:1506.02626) published, shared with 4 bits, encoded as a .dcz file,
decoded, and computed by the engine (trainer.inference) and on the models of EIE and TPU v1. The
outputs of the engine and of EIE are compared with those of the decoded dense layers. Nothing is
trained: times and energies depend on sizes and densities alone. Inputs are positive in 35% of
places, as in table III of EIE (Han et al., ISCA 2016, arXiv:1602.01528).
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.console import Console
from torch import Tensor, nn

from trainer import artifact
from trainer.engine.world import World
from trainer.hardware.costs import CostSettings, NetworkCosts, add_engine, network_costs
from trainer.hardware.cpu import measure_model
from trainer.hardware.eie import EieSettings, encode, product, shared_matrix
from trainer.inference import LayerKernel, compile, layer_kernels
from trainer.phases import Prune, Share
from trainer.report.hardware import table
from trainer.report.table import rich_table

WIDTHS = (9216, 4096, 4096, 1000)
DENSITIES = (0.09, 0.09, 0.25)
INPUT_DENSITY = 0.351


@dataclass(frozen=True)
class Chain:
    """What came out."""

    costs: NetworkCosts
    kernels: list[LayerKernel]
    file_bytes: int
    engine_error: float  # largest difference from the dense layers, by the largest output
    eie_error: float


def compressed(widths: Sequence[int], densities: Sequence[float]) -> nn.Sequential:
    """Linear layers with ReLUs between them, pruned and shared."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    names = [name for name, _ in model.named_parameters() if name.endswith("weight")]
    sparsities = {n: 1 - d for n, d in zip(names, densities, strict=True)}
    world = World.single(torch.device("cpu"))
    for phase in (Prune(overrides=sparsities), Share(bits=4)):
        phase.enter(model, world)
        phase.after_step(model, world, 1, 1)
        phase.leave(model)
    return model.eval()


def on_eie(model: nn.Sequential, x: Tensor) -> Tensor:
    """The outputs for one sample on EIE: products of encoded matrices; biases and ReLUs after."""
    settings = EieSettings(code_bits=5)  # 16 shared values and zero
    for layer in model:
        if isinstance(layer, nn.Linear):
            shared = shared_matrix(layer.weight.detach())
            matrix = encode(shared.codes, settings)
            sums = product(matrix, shared.codebook, x.numpy())
            x = torch.from_numpy(sums).float() + layer.bias.detach()
        else:
            x = layer(x)
    return x


def run(widths: Sequence[int], densities: Sequence[float], seconds: float = 0.5) -> Chain:
    """Compress, encode, decode, execute, compare."""
    torch.manual_seed(0)
    trained = compressed(widths, densities)
    content = artifact.encode(trained.state_dict(), max_seconds=1.0)
    model = copy.deepcopy(trained)
    model.load_state_dict(artifact.loads(content))
    samples = torch.rand(8, widths[0]) * (torch.rand(8, widths[0]) < INPUT_DENSITY)
    settings = CostSettings(cpu_seconds=seconds)
    costs = network_costs(model, samples, content, settings, "assumed")
    engine = compile(copy.deepcopy(model), samples=samples[:1], threads=1)
    costs = add_engine(costs, measure_model(engine, samples[:1], 1, None, seconds))
    with torch.inference_mode():
        expected, found = model(samples[:1])[0], engine(samples[:1])[0]
    largest = float(expected.abs().max())
    return Chain(
        costs,
        layer_kernels(engine),
        len(content),
        float((found - expected).abs().max()) / largest,
        float((on_eie(model, samples[0]) - expected).abs().max()) / largest,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="next to nothing: does it run?")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    chain = run((90, 60, 40, 10), DENSITIES, 0.01) if quick else run(WIDTHS, DENSITIES)
    console = Console(highlight=False, emoji=False, width=1000)
    console.print(rich_table(table(chain.costs.as_dict()), console.width))
    for row in chain.kernels:
        print(f"{row.layer}: {row.density:.1%} not zero, kernel {row.kernel}, {row.nbytes:,} bytes")
    print(
        f"model.dcz: {chain.file_bytes:,} bytes; largest difference from the dense layers: engine "
        f"{chain.engine_error:.1e}, EIE {chain.eie_error:.1e} of the largest output"
    )


if __name__ == "__main__":
    main()
