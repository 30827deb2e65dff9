"""From an integer network to a program for the TPU."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from trainer.errors import ConfigError
from trainer.hardware.tpu.instructions import (
    Activate,
    Halt,
    Instruction,
    MatrixMultiply,
    ReadHostMemory,
    ReadWeights,
    SetConfiguration,
    Synchronize,
    Vector,
    WriteHostMemory,
    listing,
)
from trainer.hardware.tpu.network import CellUpdate, Layer, Network, Pool, Product, Value
from trainer.hardware.tpu.settings import TPU_V1, TpuSettings

_ALIGNMENT = 256  # bytes: width of the paths of the unified buffer
_MAX_DEPTH = (1 << 31) // (255 * 128)  # products of 8 bits whose sum fits into 32 bits


@dataclass(frozen=True)
class Tile:
    """A part of a layer's weights that fits into the matrix unit."""

    layer: int
    group: int
    first_input: int
    inputs: int
    first_output: int
    outputs: int


@dataclass(frozen=True)
class Program:
    """Instructions, and what they refer to."""

    settings: TpuSettings
    network: Network
    instructions: Sequence[Instruction]
    tiles: Sequence[Tile]
    addresses: Mapping[str, int]
    """Where each value is in the unified buffer, by name."""
    buffer_bytes: int
    """Bytes of the unified buffer that are in use at the same time, at most."""

    def listing(self) -> str:
        """The instructions as text, one a line."""
        return listing(self.instructions)


def compile_network(network: Network, settings: TpuSettings = TPU_V1) -> Program:
    """Schedule a network on a TPU.

    Each tile of weights is read when it is used. The columns of a layer's result are computed one
    tile after the other; the rows in parts that fit into half of the accumulators.

    Raises:
        ConfigError: The values of the network do not fit into the unified buffer, or a sum does not
            fit into an accumulator.
    """
    for layer in network.layers:
        if isinstance(layer, Product) and layer.depth > _MAX_DEPTH:
            raise ConfigError(
                f"{layer.name} adds up {layer.depth:,} products: the accumulators of the TPU have "
                f"32 bits and hold {_MAX_DEPTH:,}"
            )
    addresses, buffer_bytes = _allocate(network)
    if buffer_bytes > settings.unified_buffer:
        raise ConfigError(
            f"unified_buffer={settings.unified_buffer:,}: the network needs {buffer_bytes:,} bytes "
            "for its activations; use a smaller batch"
        )
    tiles: list[Tile] = []
    body: list[Instruction] = [_read_host(network.input, addresses)]
    unfinished = {network.input.name}  # values that are not in the buffer for certain
    values = {value.name: value for value in _values(network)}
    for name in network.initial:
        body.append(_read_host(values[name], addresses))
        unfinished.add(name)
    for number, layer in enumerate(network.layers):
        reads, writes = _reads(layer), _writes(layer)
        if unfinished & {value.name for value in reads}:
            body.append(Synchronize())
            unfinished.clear()
        body.append(SetConfiguration(number, layer.name))
        unfinished |= {value.name for value in writes}
        if isinstance(layer, Product):
            body += _multiply(number, layer, tiles, settings)
        else:
            kind = "update_cell" if isinstance(layer, CellUpdate) else _pooling(layer)
            body.append(Vector(kind, sum(value.size for value in (*reads, *writes))))
    output = network.output
    body += [
        Synchronize(),
        WriteHostMemory(output.name, addresses[output.name], output.size),
        Halt(),
    ]
    program = list(_prefetched(body, settings.weight_fifo_tiles))
    return Program(settings, network, program, tiles, addresses, buffer_bytes)


def _pooling(layer: Pool) -> str:
    height, width = layer.window.kernel
    return f"{'average' if layer.average else 'maximum'} of {height} x {width}"


def _read_host(value: Value, addresses: Mapping[str, int]) -> ReadHostMemory:
    return ReadHostMemory(value.name, addresses[value.name], value.size)


def _multiply(
    number: int, layer: Product, tiles: list[Tile], settings: TpuSettings
) -> Iterator[Instruction]:
    """The matrix products of a layer and their activations; its tiles are added to `tiles`."""
    size, half = settings.array_size, settings.accumulators // 2
    slices = _input_slices(layer, settings)
    row_parts = list(_parts(layer.rows, half))
    turn = 0
    for group in range(layer.groups):
        for first_output, outputs in _blocks(layer.outputs, size):
            for first_row, rows in row_parts:
                accumulator = (turn % 2) * half
                turn += 1
                for index, (first_input, inputs) in enumerate(slices):
                    next_tile = len(slices) > 1 or first_row == 0
                    if next_tile:
                        tiles.append(
                            Tile(number, group, first_input, inputs, first_output, outputs)
                        )
                    yield MatrixMultiply(
                        first_row,
                        rows,
                        group,
                        first_input,
                        inputs,
                        outputs,
                        accumulator,
                        accumulate=index > 0,
                        next_tile=next_tile,
                        speed=layer.activation_bytes,
                        convolve=layer.window is not None,
                    )
                operand = layer.operand.value.dtype.itemsize if layer.operand else 0
                yield Activate(
                    first_row,
                    rows,
                    group * layer.outputs + first_output,
                    outputs,
                    accumulator,
                    layer.destination.value.dtype.itemsize + operand,
                )


def _input_slices(layer: Product, settings: TpuSettings) -> list[tuple[int, int]]:
    """First input and number of inputs of each pass, of those that a column of weights has."""
    positions, channels = layer.weights.shape[2:]
    if settings.packed_kernels:
        return list(_blocks(layer.depth, settings.array_size))
    return [
        (position * channels + first, count)
        for position in range(positions)
        for first, count in _blocks(channels, settings.array_size)
    ]


def _blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Beginning and length of blocks of `size`, and of a shorter last one."""
    for first in range(0, total, size):
        yield first, min(size, total - first)


def _parts(total: int, most: int) -> Iterator[tuple[int, int]]:
    """Beginning and length of as few parts of about equal length as `most` allows."""
    return _blocks(total, math.ceil(total / math.ceil(total / most)))


def _prefetched(body: Sequence[Instruction], ahead: int) -> Iterator[Instruction]:
    """The program with the tiles read as early as the FIFO has room for them."""
    tiles = sum(isinstance(x, MatrixMultiply) and x.next_tile for x in body)
    requested = min(ahead, tiles)
    yield from map(ReadWeights, range(requested))
    for instruction in body:
        yield instruction
        takes_tile = isinstance(instruction, MatrixMultiply) and instruction.next_tile
        if takes_tile and requested < tiles:
            yield ReadWeights(requested)
            requested += 1


def _allocate(network: Network) -> tuple[dict[str, int], int]:
    """An address for each value, and the bytes in use at most.

    Values whose lifetimes overlap have different places; each takes the first gap that it fits
    into.
    """
    lifetimes = _lifetimes(network)
    placed: list[tuple[int, int, int, int]] = []  # first use, last use, address, end
    addresses: dict[str, int] = {}
    for value in _values(network):
        first, last = lifetimes[value.name]
        size = -(-value.size // _ALIGNMENT) * _ALIGNMENT
        address = 0
        for begin, end, start, stop in sorted(placed, key=lambda place: place[2]):
            overlaps = begin <= last and first <= end
            if overlaps and start < address + size and address < stop:
                address = stop
        addresses[value.name] = address
        placed.append((first, last, address, address + size))
    return addresses, max(stop for *_, stop in placed)


def _lifetimes(network: Network) -> dict[str, tuple[int, int]]:
    """Layers that first and last use each value; the host's writes come before the first layer."""
    lifetimes = {name: (-1, -1) for name in (network.input.name, *network.initial)}
    for number, layer in enumerate(network.layers):
        for value in (*_reads(layer), *_writes(layer)):
            first, _ = lifetimes.get(value.name, (number, number))
            lifetimes[value.name] = (first, number)
    first, _ = lifetimes[network.output.name]
    lifetimes[network.output.name] = (first, len(network.layers))
    return lifetimes


def _values(network: Network) -> list[Value]:
    """All values, in the order of their first use."""
    found = {network.input.name: network.input}
    for layer in network.layers:
        for value in (*_reads(layer), *_writes(layer)):
            found.setdefault(value.name, value)
    return list(found.values())


def _reads(layer: Layer) -> list[Value]:
    match layer:
        case Product():
            rows = (layer.source, layer.operand)
            return [row.value for row in rows if row is not None]
        case Pool():
            return [layer.source]
        case CellUpdate():
            return [layer.gates, layer.cell]


def _writes(layer: Layer) -> list[Value]:
    match layer:
        case Product():
            return [layer.destination.value]
        case Pool():
            return [layer.destination]
        case CellUpdate():
            return [layer.cell, layer.destination.value]
