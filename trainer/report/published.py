"""The figures of Deep Compression to set a result beside (Han, Mao & Dally, ICLR 2016, tables 1, 4
and 5, arXiv:1510.00149): ratio to the dense FP32 weights in bytes, and top-1 error as a fraction.

The column P of the tables is left out: it counts weights, not the bytes that their positions take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Figure = dict[str, float | None]


@dataclass(frozen=True)
class _Net:
    """What was published of one net, and what it takes to be that net."""

    outputs: int
    data: str | None  # the target that loads what it was trained on; None: any with such outputs
    dense: float  # error
    shared: float  # ratio
    coded: float  # ratio
    error: float  # of the coded net

    def rows(self) -> dict[str, Figure]:
        """By stage."""
        return {
            "dense": {"ratio": 1.0, "error": self.dense},
            "P+S": {"ratio": self.shared, "error": None},
            "P+S+H (Han's format)": {"ratio": self.coded, "error": self.error},
        }


_MNIST = "trainer.data.mnist"
_NETS = {
    "LeNet300": _Net(10, _MNIST, 0.0164, 32, 40, 0.0158),
    "LeNet5": _Net(10, _MNIST, 0.0080, 33, 39, 0.0074),
    "AlexNet": _Net(1000, None, 0.4278, 27, 35, 0.4278),
    "VGG16": _Net(1000, None, 0.3150, 31, 49, 0.3117),
}


def published(model: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Figure]:
    """The published figures by stage; empty for what has none.

    Args:
        model, data: the settings; the nets of trainer.models count, with as many outputs as the
            published ones, and LeNets on the MNIST that ships.
    """
    module, _, name = str(model.get("_target_")).rpartition(".")
    net = _NETS.get(name)
    if net is None or not f"{module}.".startswith("trainer.models."):
        return {}
    if model.get("classes", net.outputs) != net.outputs:
        return {}
    if net.data is not None and (data.get("_target_") != net.data or data.get("root")):
        return {}
    return net.rows()
