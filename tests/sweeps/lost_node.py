"""A sweep on a cluster whose only node with CPUs goes in the middle of trial 1; another one comes.

    RAY_TMPDIR=SHORT_FOLDER python lost_node.py ARGUMENT...

Leaves the numbers of the trials that had finished before in the file `finished`.
"""

import subprocess
import sys
import time
from pathlib import Path

from ray.cluster_utils import Cluster

FOLDER = Path("outputs/sweep_smoke/sweep")
CURVES = FOLDER / "curves" / "0001" / "curves.csv"
AWAY_S = 1.0


def main() -> int:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    try:
        node = cluster.add_node(num_cpus=1)
        address = f"cluster.address={cluster.address}"
        sweep = subprocess.Popen([sys.executable, "-m", "trainer", *sys.argv[1:], address])
        while not has_begun() and sweep.poll() is None:
            time.sleep(0.02)
        Path("finished").write_text("\n".join(trials_that_finished()))
        cluster.remove_node(node, allow_graceful=False)
        time.sleep(AWAY_S)
        cluster.add_node(num_cpus=1)
        return sweep.wait()
    finally:
        cluster.shutdown()


def has_begun() -> bool:
    """Whether trial 1, the second one of the only slot, has trained for an epoch."""
    return CURVES.exists() and "epoch/" in CURVES.read_text()


def trials_that_finished() -> list[str]:
    lines = (FOLDER / "log.txt").read_text().splitlines()
    return [line.split()[1].rstrip(":") for line in lines if ": accuracy" in line]


if __name__ == "__main__":
    sys.exit(main())
