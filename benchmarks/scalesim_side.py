"""Cycles of SCALE-Sim for matrix products: run by benchmarks/hardware_tables.py in an environment
that has scalesim 3.0.0 and numpy<2.

Reads a JSON list of products [rows, inner, columns] and writes a JSON list of their cycles on a
weight-stationary array of 256 x 256.
"""

import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

from scalesim.scale_sim import scalesim

LAYOUT = {
    f"{kind}{key}": value
    for kind in ("Ifmap", "Filter")
    for key, value in {
        "CustomLayout": False,
        "SRAMBankBandwidth": 10,
        "SRAMBankNum": 10,
        "SRAMBankPort": 2,
    }.items()
}
CONFIG = {
    "general": {"run_name": "products"},
    "architecture_presets": {
        "ArrayHeight": 256,
        "ArrayWidth": 256,
        "IfmapSramSzkB": 24576,
        "FilterSramSzkB": 24576,
        "OfmapSramSzkB": 24576,
        "IfmapOffset": 0,
        "FilterOffset": 10**8,
        "OfmapOffset": 2 * 10**8,
        "Dataflow": "ws",
        "Bandwidth": 1000,
        "ReadRequestBuffer": 64,
        "WriteRequestBuffer": 64,
    },
    "layout": LAYOUT,
    "sparsity": {
        "SparsitySupport": False,
        "SparseRep": "ellpack_block",
        "OptimizedMapping": False,
        "BlockSize": 8,
        "RandomNumberGeneratorSeed": 40,
    },
    "run_presets": {"InterfaceBandwidth": "CALC", "UseRamulatorTrace": False},
}


def cycles(products: list[list[int]]) -> list[int]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        here = Path(folder)
        config, topology, layout = (here / name for name in ("config", "topology", "layout"))
        sections = (
            f"[{section}]\n" + "".join(f"{key}: {value}\n" for key, value in entries.items())
            for section, entries in CONFIG.items()
        )
        config.write_text("".join(sections))
        rows = (f"product{i},{m},{n},{k},\n" for i, (m, k, n) in enumerate(products))
        topology.write_text("Layer,M,N,K,\n" + "".join(rows))
        layout.write_text("none,\n")
        simulator = scalesim(
            save_disk_space=True,
            verbose=False,
            config=str(config),
            topology=str(topology),
            layout=str(layout),
            input_type_gemm=True,
        )
        simulator.run_scale(top_path=folder)
        report = next(here.rglob("COMPUTE_REPORT.csv")).read_text().splitlines()
    total = report[0].split(",").index(" Total Cycles")
    return [int(float(row.split(",")[total])) for row in report[1:] if row.strip()]


if __name__ == "__main__":
    print(json.dumps(cycles(json.load(sys.stdin))))
