"""The energy of single operations and memory accesses, in picojoules: tables that can be replaced.

The figures are those of arithmetic units and memories alone. A processor spends far more on each
operation, to fetch, decode and schedule its instructions: no sum of these figures is the energy of
a CPU.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from trainer.errors import ConfigError

NumberFormat = Literal["fp32", "fp16", "int8"]

# In which format products of a format are summed up.
_ACCUMULATORS: Mapping[NumberFormat, str] = MappingProxyType(
    {"fp32": "fp32", "fp16": "fp32", "int8": "int32"}
)

_WORD = 4  # bytes


@dataclass(frozen=True)
class EnergyTable:
    """Picojoules of operations and of moving 32 bits.

    mine = EnergyTable(
        name="my chip", source="measured",
        multiply={"int8": 0.1, "fp16": 0.5, "fp32": 1.2},
        add={"int32": 0.05, "fp32": 0.3},
        on_chip_word=2.0, off_chip_word=120.0,
    )
    cheaper_memory = dataclasses.replace(HOROWITZ, off_chip_word=100.0)
    """

    name: str
    source: str
    multiply: Mapping[str, float]
    """By number format."""
    add: Mapping[str, float]
    """By number format; products are added up as fp32 or int32."""
    on_chip_word: float
    """To read or write 32 bits in on-chip memory."""
    off_chip_word: float
    """To read or write 32 bits in off-chip memory."""
    assumed: frozenset[str] = field(default_factory=frozenset)
    """Entries that the source does not give, such as "multiply.int8" or "off_chip_word"."""

    def __post_init__(self) -> None:
        figures: dict[str, object] = {
            **{f"multiply.{key}": value for key, value in self.multiply.items()},
            **{f"add.{key}": value for key, value in self.add.items()},
            "on_chip_word": self.on_chip_word,
            "off_chip_word": self.off_chip_word,
        }
        for key, value in figures.items():
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ConfigError(
                    f"energy table {self.name!r}: {key} must be a finite number of at least 0, "
                    f"not {value!r}"
                )
        unknown = min(set(self.assumed) - set(figures), default=None)
        if unknown is not None:
            raise ConfigError(
                f"energy table {self.name!r}: assumed names {unknown!r}; there are "
                f"{', '.join(figures)}"
            )

    def mac(self, number: NumberFormat) -> float:
        """Picojoules of a multiply-accumulate. Raises ConfigError if the table has no entry."""
        accumulator = _ACCUMULATORS[number]
        for entries, key, kind in (
            (self.multiply, number, "multiply"),
            (self.add, accumulator, "add"),
        ):
            if key not in entries:
                raise ConfigError(f"energy table {self.name!r}: {kind} has no entry {key!r}")
        return self.multiply[number] + self.add[accumulator]

    def assumes_mac(self, number: NumberFormat) -> bool:
        """Whether the energy of a multiply-accumulate is partly an assumption."""
        entries = {f"multiply.{number}", f"add.{_ACCUMULATORS[number]}"}
        return bool(self.assumed & entries)

    def on_chip(self, size: float) -> float:
        """Picojoules to move `size` bytes to or from on-chip memory."""
        return size / _WORD * self.on_chip_word

    def off_chip(self, size: float) -> float:
        """Picojoules to move `size` bytes to or from off-chip memory."""
        return size / _WORD * self.off_chip_word


HOROWITZ = EnergyTable(
    name="Horowitz 45 nm",
    source="M. Horowitz, Computing's energy problem, ISSCC 2014: 45 nm, 0.9 V; on-chip memory is a "
    "cache of 8 KB, off-chip memory is taken from EIE's table I",
    multiply={"int8": 0.2, "int32": 3.1, "fp16": 1.1, "fp32": 3.7},
    add={"int8": 0.03, "int16": 0.05, "int32": 0.1, "fp16": 0.4, "fp32": 0.9},
    on_chip_word=5.0,
    off_chip_word=640.0,
    assumed=frozenset({"off_chip_word"}),
)

EIE_TABLE_I = EnergyTable(
    name="EIE table I",
    source="Han et al., EIE, ISCA 2016, arXiv:1602.01528, table I: 45 nm, on-chip memory of 32 KB; "
    "8-bit and 16-bit arithmetic is taken from Horowitz",
    multiply=HOROWITZ.multiply,
    add=HOROWITZ.add,
    on_chip_word=5.0,
    off_chip_word=640.0,
    assumed=frozenset({"multiply.int8", "multiply.fp16"}),
)

LECTURE = replace(
    HOROWITZ,
    name="lecture",
    source="two figures of the lecture: 800 pJ for a memory access, taken as 32 bits off the chip, "
    "and 0.2 pJ for an 8-bit multiplication; everything else is taken from Horowitz",
    off_chip_word=800.0,
    assumed=frozenset({"multiply.fp16", "multiply.fp32", "add.int32", "add.fp32", "on_chip_word"}),
)

TABLES: Mapping[str, EnergyTable] = MappingProxyType(
    {"horowitz": HOROWITZ, "eie": EIE_TABLE_I, "lecture": LECTURE}
)
"""The named tables."""
