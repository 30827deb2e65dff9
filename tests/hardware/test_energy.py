"""Energy tables: the published figures, and what is missing in them."""

from dataclasses import replace
from typing import Any

import pytest

from trainer.errors import ConfigError
from trainer.hardware import EIE_TABLE_I, HOROWITZ, LECTURE, TABLES, EnergyTable


def test_published_energies() -> None:
    assert HOROWITZ.mac("fp32") == pytest.approx(3.7 + 0.9)
    assert HOROWITZ.mac("fp16") == pytest.approx(1.1 + 0.9)
    assert HOROWITZ.mac("int8") == pytest.approx(0.2 + 0.1)
    assert EIE_TABLE_I.off_chip(4) == 640
    assert EIE_TABLE_I.off_chip(1) / EIE_TABLE_I.on_chip(1) == 128
    assert LECTURE.off_chip(4) / LECTURE.multiply["int8"] == pytest.approx(4000)
    assert TABLES == {"horowitz": HOROWITZ, "eie": EIE_TABLE_I, "lecture": LECTURE}


def test_what_a_source_does_not_give_is_marked() -> None:
    assert HOROWITZ.assumed == {"off_chip_word"}
    assert EIE_TABLE_I.assumes_mac("int8")
    assert not EIE_TABLE_I.assumes_mac("fp32")
    assert LECTURE.assumes_mac("fp32")
    assert not HOROWITZ.assumes_mac("int8")


def test_a_table_of_ones_own() -> None:
    mine = EnergyTable("mine", "none", {"int8": 1.0}, {"int32": 2.0}, 4.0, 40.0)
    assert mine.mac("int8") == 3
    assert mine.on_chip(2) == 2
    with pytest.raises(ConfigError, match="'mine': multiply has no entry 'fp32'"):
        mine.mac("fp32")
    with pytest.raises(ConfigError, match="'mine': add has no entry 'int32'"):
        replace(mine, add={}).mac("int8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"multiply": {"int8": "cheap"}},
            "multiply.int8 must be a finite number .*, not 'cheap'",
        ),
        ({"add": {"int32": -1.0}}, "add.int32 must be a finite number .*, not -1.0"),
        (
            {"on_chip_word": float("nan")},
            "on_chip_word must be a finite number .*, not nan",
        ),
        ({"off_chip_word": None}, "off_chip_word must be a finite number .*, not None"),
        ({"assumed": {"of_chip_word"}}, "assumed names 'of_chip_word'; there are multiply.int8, "),
    ],
)
def test_entries_that_are_no_energies(change: dict[str, Any], message: str) -> None:
    mine = EnergyTable("mine", "none", {"int8": 1.0}, {"int32": 2.0}, 4.0, 40.0)
    with pytest.raises(ConfigError, match=f"^energy table 'mine': {message}"):
        replace(mine, **change)
