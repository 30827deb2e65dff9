"""The instructions of the TPU, and how a program is listed.

Jouppi et al., ISCA 2017, arXiv:1704.04760, section 2, names Read_Host_Memory, Read_Weights,
MatrixMultiply or Convolve, Activate and Write_Host_Memory, and among others a synchronization, a
configuration and a halt. Their fields are a model of this project: the paper gives few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ReadHostMemory:
    """Copy from the host into the unified buffer."""

    name: str
    address: int
    size: int
    """Bytes."""


@dataclass(frozen=True)
class WriteHostMemory:
    """Copy from the unified buffer to the host."""

    name: str
    address: int
    size: int
    """Bytes."""


@dataclass(frozen=True)
class ReadWeights:
    """Fetch a tile from the weight memory into the FIFO; done as soon as it is requested."""

    tile: int


@dataclass(frozen=True)
class SetConfiguration:
    """Set up the units for a layer: addresses, window, multipliers."""

    layer: int
    name: str


@dataclass(frozen=True)
class MatrixMultiply:
    """Multiply rows by the tile in the array, into accumulators; Convolve if there is a window."""

    first_row: int
    rows: int
    group: int
    first_input: int
    inputs: int
    """Rows of the array that are in use."""
    columns: int
    """Columns of the array that are in use."""
    accumulator: int
    """The first row of accumulators."""
    accumulate: bool
    """Whether the products are added to what the accumulators hold."""
    next_tile: bool
    """Whether the array takes the next tile of the FIFO first."""
    speed: int
    """Cycles for a row: 1, or 2 with 16-bit activations."""
    convolve: bool


@dataclass(frozen=True)
class Activate:
    """Bring sums from accumulators to the unified buffer: bias, scale, operand, function."""

    first_row: int
    rows: int
    first_channel: int
    columns: int
    accumulator: int
    value_bytes: int
    """Bytes of a result and of what is added to it."""


@dataclass(frozen=True)
class Vector:
    """An operation of the activation unit from the unified buffer to the unified buffer."""

    operation: str
    size: int
    """Bytes that are read and written."""


@dataclass(frozen=True)
class Synchronize:
    """Wait until all results and inputs are in the unified buffer."""


@dataclass(frozen=True)
class Halt:
    """End the program."""


Instruction = (
    ReadHostMemory
    | WriteHostMemory
    | ReadWeights
    | SetConfiguration
    | MatrixMultiply
    | Activate
    | Vector
    | Synchronize
    | Halt
)


def listing(instructions: Sequence[Instruction]) -> str:
    """A program as text, one instruction a line."""
    width = len(str(max(len(instructions) - 1, 0)))
    lines = (f"{number:{width}}  {_line(x)}".rstrip() for number, x in enumerate(instructions))
    return "\n".join(lines)


def _line(instruction: Instruction) -> str:
    match instruction:
        case ReadHostMemory(name, address, size):
            return f"{'Read_Host_Memory':<19}{name} -> buffer {address:#09x}, {size:,} bytes"
        case WriteHostMemory(name, address, size):
            return f"{'Write_Host_Memory':<19}buffer {address:#09x} -> {name}, {size:,} bytes"
        case ReadWeights() as x:
            return f"{'Read_Weights':<19}tile {x.tile}"
        case SetConfiguration(layer, name):
            return f"{'Set_Configuration':<19}layer {layer}: {name}"
        case MatrixMultiply() as x:
            operation = "Convolve" if x.convolve else "MatrixMultiply"
            rows = f"rows {x.first_row}..{x.first_row + x.rows - 1}"
            inputs = f"inputs {x.first_input}..{x.first_input + x.inputs - 1}"
            target = f"{'+=' if x.accumulate else '->'} accumulators {x.accumulator}"
            tile = ", next tile" if x.next_tile else ""
            return f"{operation:<19}{rows}, {inputs} {target}, {x.columns} columns{tile}"
        case Activate() as x:
            channels = f"channels {x.first_channel}..{x.first_channel + x.columns - 1}"
            rows = f"rows {x.first_row}..{x.first_row + x.rows - 1}"
            return f"{'Activate':<19}accumulators {x.accumulator} -> {rows}, {channels}"
        case Vector(operation, size):
            return f"{'Activate':<19}{operation}, {size:,} bytes read and written"
        case Synchronize():
            return "Synchronize"
        case Halt():
            return "Halt"
