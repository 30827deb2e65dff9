"""Run compressed models without expanding them.

    model = trainer.inference.compile(LeNet5(), "model.dcz", samples=images[:1])

docs/inference.md explains the kernels. `python -m trainer.inference FILE` measures latencies.
"""

from trainer.inference.build import chosen_kernels, compile, layer_kernels
from trainer.inference.layers import LayerKernel

__all__ = ["LayerKernel", "chosen_kernels", "compile", "layer_kernels"]
