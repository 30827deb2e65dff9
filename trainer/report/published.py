"""The figures of Deep Compression to set a result beside (Han, Mao & Dally, ICLR 2016, tables 1, 4
and 5, arXiv:1510.00149): ratio to the dense FP32 weights, and top-1 error as a fraction.
"""

from collections.abc import Mapping
from typing import Any

Figure = dict[str, float | None]


def _rows(
    dense: float, error: float, pruned: float, shared: float, coded: float
) -> dict[str, Figure]:
    return {
        "dense": {"ratio": 1.0, "error": dense},
        "P": {"ratio": pruned, "error": None},
        "P+S": {"ratio": shared, "error": None},
        "P+S+H (Han's format)": {"ratio": coded, "error": error},
    }


_BY_MODEL = {
    "LeNet300": _rows(0.0164, 0.0158, 12, 32, 40),
    "LeNet5": _rows(0.0080, 0.0074, 12, 33, 39),
    "AlexNet": _rows(0.4278, 0.4278, 9, 27, 35),
    "VGG16": _rows(0.3150, 0.3117, 13, 31, 49),
}


def published(model: Mapping[str, Any]) -> dict[str, Figure]:
    """The published figures by stage; empty for a model that has none.

    Args:
        model: the settings of the model; the class that `_target_` names counts.
    """
    return _BY_MODEL.get(str(model.get("_target_")).rpartition(".")[2], {})
