"""The first tensor processing unit: compiler, functional executor and cycle model.

    program = compile_network(lower(model, samples))
    print(program.listing())
    logits = execute(program, samples)
    cost = count_cycles(program)

Jouppi et al., In-Datacenter Performance Analysis of a Tensor Processing Unit, ISCA 2017,
arXiv:1704.04760.
"""

from trainer.hardware.tpu.compiler import Program, compile_network
from trainer.hardware.tpu.cycles import TpuCycles, count_cycles
from trainer.hardware.tpu.executor import execute, execute_integers
from trainer.hardware.tpu.lowering import lower
from trainer.hardware.tpu.network import Network
from trainer.hardware.tpu.reference import reference
from trainer.hardware.tpu.settings import BUSY_WATTS, TPU_PRIME, TPU_V1, TpuSettings

__all__ = [
    "BUSY_WATTS",
    "TPU_PRIME",
    "TPU_V1",
    "Network",
    "Program",
    "TpuCycles",
    "TpuSettings",
    "compile_network",
    "count_cycles",
    "execute",
    "execute_integers",
    "lower",
    "reference",
]
