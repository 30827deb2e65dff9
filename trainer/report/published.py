"""Published figures to compare a result with: Deep Compression (Han, Mao & Dally, ICLR 2016, tables
1, 4 and 5, arXiv:1510.00149). Ratios are to the bytes of the dense fp32 weights; errors are top-1,
as fractions.

The column P of the tables is left out: it counts weights, not the bytes that their positions take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Figure = dict[str, float | None]


@dataclass(frozen=True)
class _Network:
    """The published figures of one network, and which runs are comparable with them."""

    outputs: int
    data: str | None  # `_target_` of the data it was trained on; None: any with these outputs
    dense: float  # error
    shared: float  # ratio
    coded: float  # ratio
    error: float  # of the coded network

    def rows(self) -> dict[str, Figure]:
        """The figures by stage."""
        return {
            "dense": {"ratio": 1.0, "error": self.dense},
            "P+S": {"ratio": self.shared, "error": None},
            "P+S+H (Han's format)": {"ratio": self.coded, "error": self.error},
        }


_MNIST = "trainer.data.mnist"
_NETWORKS = {
    "LeNet300": _Network(10, _MNIST, 0.0164, 32, 40, 0.0158),
    "LeNet5": _Network(10, _MNIST, 0.0080, 33, 39, 0.0074),
    "AlexNet": _Network(1000, None, 0.4278, 27, 35, 0.4278),
    "VGG16": _Network(1000, None, 0.3150, 31, 49, 0.3117),
}
_SMALLEST_TRAINING_SET = 50_000  # MNIST images that a comparable run trains on
_MNIST_IMAGES = 60_000  # for training and validation
_VALIDATION = 5_000  # of these, by default


def published(model: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Figure]:
    """The published figures that a run can be compared with.

    Comparable are networks of trainer.models with as many outputs as the published ones; the LeNets
    only on the MNIST that ships, with its whole test set and at least 50,000 training images.

    Args:
        model, data: the settings of these sections.

    Returns:
        The figures by stage; empty for a run that is not comparable.
    """
    module, _, name = str(model.get("_target_")).rpartition(".")
    network = _NETWORKS.get(name)
    if network is None or not f"{module}.".startswith("trainer.models."):
        return {}
    if model.get("classes", network.outputs) != network.outputs:
        return {}
    if network.data is not None and not _is_complete_mnist(data):
        return {}
    return network.rows()


def _is_complete_mnist(data: Mapping[str, Any]) -> bool:
    others = _MNIST_IMAGES - data.get("validation", _VALIDATION)
    return (
        data.get("_target_") == _MNIST
        and not data.get("root")
        and data.get("test") is None
        and min(data.get("train") or others, others) >= _SMALLEST_TRAINING_SET
    )
