"""nncodec's own quantization and coding of a model, for benchmarks/minilm.py and rounding.py.

    python benchmarks/nncodec_side.py IN.safetensors OUT.safetensors STEP DEPENDENT LAMBDA

Runs in an environment with nncodec 2.1.3 and safetensors. Each tensor of two and more dimensions is
quantized with the step that is nearest to STEP root mean squares of its elements, of those that the
standard has with a density of 4 (16 an octave), by dependent (trellis) quantization with 8 states
if DEPENDENT is 1; LAMBDA is nncodec's lambda_scale, the price of bits (0, its default: none). Other
tensors keep nncodec's default step, 2^-18.75. Writes what is decoded, and prints the bytes of the
whole bit-stream.
"""

import sys

import numpy as np
from nncodec import nnc
from nncodec.nnc_core.common import get_qp_from_stepsize
from safetensors.numpy import load_file, save_file

_DENSITY = 4


def main() -> None:
    source, target, step, dependent, price = sys.argv[1:]
    weights = load_file(source)
    steps = {}
    for name, weight in weights.items():
        size = float(np.sqrt(np.square(weight[weight != 0]).mean()))
        # The standard's step is that of the union of both grids, as fine again as either.
        wanted = float(step) * size / (2 if dependent == "1" else 1)
        if weight.ndim > 1:
            steps[name] = np.int32(round(get_qp_from_stepsize(wanted, _DENSITY)))
        else:
            steps[name] = np.int32(-75 * (1 << _DENSITY) // 4)
    content = nnc.compress(
        weights,
        bitstream_path=None,
        qp_density=_DENSITY,
        qp_per_tensor=steps,
        use_dq=dependent == "1",
        lambda_scale=float(price),
        row_skipping=True,
        return_bitstream=True,
    )
    save_file({k: np.ascontiguousarray(v) for k, v in nnc.decompress(content).items()}, target)
    print(len(content))


if __name__ == "__main__":
    main()
