"""The power and area of EIE: the published tables agree with each other."""

from statistics import geometric_mean

import pytest

from trainer.hardware.eie import square_millimetres, watts
from trainer.hardware.eie.power import (
    MODULE_MILLIWATTS,
    MODULE_SQUARE_MICROMETRES,
    detection_nodes,
)
from trainer.hardware.eie.published import (
    CPU_SPEEDUP,
    EIE_64,
    ELEMENT_MILLIWATTS,
    ELEMENT_SQUARE_MICROMETRES,
    LAYERS,
)


def test_modules_add_up_to_the_element_of_table_2() -> None:
    assert sum(MODULE_MILLIWATTS.values()) == pytest.approx(ELEMENT_MILLIWATTS, abs=0.002)
    assert sum(MODULE_SQUARE_MICROMETRES.values()) == pytest.approx(ELEMENT_SQUARE_MICROMETRES)


def test_64_elements_are_the_accelerator_of_table_5() -> None:
    assert detection_nodes(64) == 16 + 4 + 1
    assert watts(64) == pytest.approx(EIE_64.watts, abs=0.005)
    assert square_millimetres(64) == pytest.approx(EIE_64.square_millimetres, abs=0.05)


def test_the_speedups_of_figure_6_follow_from_table_4() -> None:
    """But for NT-We and NT-LSTM: the figure has 63 and 60 where the table gives 76 and 63."""
    speedups = {layer.name: layer.cpu_dense / layer.actual for layer in LAYERS}
    assert [round(speedups[name]) for name in ("Alex-6", "Alex-7", "Alex-8")] == [248, 507, 115]
    mean = geometric_mean(speedups.values())
    assert mean == pytest.approx(194, abs=0.5)
    corrected = geometric_mean((speedups | {"NT-We": 63, "NT-LSTM": 60}).values())
    assert corrected == pytest.approx(CPU_SPEEDUP, rel=0.002)
