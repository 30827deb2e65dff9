"""The number of cycles of a program, and the state of the matrix unit in each of them.

Jouppi et al., ISCA 2017, arXiv:1704.04760, section 2. Four units work at the same time: the host
interface, the weight memory, the matrix unit and the activation unit. Instructions are issued in
order. The weight memory runs ahead of the matrix unit by the tiles that the FIFO holds; a tile is
shifted into the array row by row, while the array still multiplies by the one before it.

Each cycle belongs to one kind, as in table 3 of the paper:

    active        the matrix unit multiplies
    weight stall  it could multiply, but its weights have not arrived
    weight shift  it could multiply, but its weights are being shifted in
    non-matrix    it waits for inputs, for results of the layer before, or for accumulators
"""

from collections import deque
from dataclasses import dataclass

from trainer.hardware.tpu.compiler import Program
from trainer.hardware.tpu.instructions import (
    Activate,
    Instruction,
    MatrixMultiply,
    ReadHostMemory,
    ReadWeights,
    Synchronize,
    Vector,
    WriteHostMemory,
)
from trainer.hardware.tpu.settings import BUSY_WATTS, TpuSettings


@dataclass(frozen=True)
class TpuCycles:
    """Cycles of one execution of a program."""

    settings: TpuSettings
    total: float
    active: float
    weight_stall: float
    weight_shift: float
    non_matrix: float
    input_wait: float
    """Part of `non_matrix`: the matrix unit waits for inputs from the host."""
    result_wait: float
    """Part of `non_matrix`: it waits for results of the layer before, or for accumulators."""
    useful: float
    """Active cycles, times the fraction of the array that holds weights and no padding."""
    macs: int
    weight_reads: int
    """Bytes from the weight memory."""

    @property
    def seconds(self) -> float:
        """Time of one execution."""
        return self.total / self.settings.clock

    @property
    def tops(self) -> float:
        """Multiplications and additions per second, in units of 10^12."""
        return 2 * self.macs / self.seconds / 1e12

    @property
    def joules(self) -> float:
        """Energy of one execution: its time at the power that the paper measured on a busy die."""
        return self.seconds * BUSY_WATTS


def count_cycles(program: Program) -> TpuCycles:
    """Count the cycles of a program, from the first instruction to the last result at the host."""
    timeline = _Timeline(program.settings)
    for instruction in program.instructions:
        timeline.issue(instruction)
    end = max(timeline.host_free, timeline.activation_free, timeline.matrix_free)
    matrix = timeline.active + timeline.weight_stall + timeline.weight_shift
    return TpuCycles(
        settings=program.settings,
        total=end,
        active=timeline.active,
        weight_stall=timeline.weight_stall,
        weight_shift=timeline.weight_shift,
        non_matrix=end - matrix,
        input_wait=timeline.input_wait,
        result_wait=timeline.result_wait,
        useful=timeline.useful,
        macs=program.network.macs,
        weight_reads=timeline.tiles * program.settings.tile_bytes,
    )


class _Timeline:
    """When each unit becomes free, in cycles."""

    def __init__(self, settings: TpuSettings) -> None:
        self._settings = settings
        self._half = settings.accumulators // 2
        # A row enters the array skewed, and its sums leave after they have passed all rows.
        self._latency = 2 * settings.array_size
        self._issued = 0.0  # when the last instruction was issued
        self.host_free = 0.0
        self.activation_free = 0.0
        self.matrix_free = 0.0
        self._memory_free = 0.0
        self._arrivals: deque[float] = deque()  # of the tiles in the FIFO
        self._shadow_free = 0.0  # when the tile that was shifted in last went into use
        self._inputs_read = 0.0  # when the last read from the host ends
        self._inputs_ready = 0.0  # as of the last synchronization, like the next
        self._results_ready = 0.0
        # When each half of the accumulators is read: first cycle, cycles of a row, rows.
        self._reading = [(0.0, 0.0, 0), (0.0, 0.0, 0)]
        self.active = 0.0
        self.useful = 0.0
        self.weight_stall = 0.0
        self.weight_shift = 0.0
        self.input_wait = 0.0
        self.result_wait = 0.0
        self.tiles = 0

    def issue(self, instruction: Instruction) -> None:
        match instruction:
            case ReadHostMemory(_, _, size):
                self.host_free = max(self.host_free, self._issued) + self._host_cycles(size)
                self._inputs_read = self.host_free
            case WriteHostMemory(_, _, size):
                start = max(self.host_free, self._inputs_ready, self._results_ready)
                self.host_free = start + self._host_cycles(size)
            case ReadWeights():
                start = max(self._memory_free, self._issued)
                self._memory_free = start + self._settings.tile_cycles
                self._arrivals.append(self._memory_free)
                self.tiles += 1
            case MatrixMultiply():
                self._multiply(instruction)
            case Activate():
                self._activate(instruction)
            case Vector(_, size):
                start = max(self.activation_free, self._inputs_ready)
                self.activation_free = start + size / self._settings.array_size
            case Synchronize():
                self._inputs_ready = self._inputs_read
                self._results_ready = self.activation_free

    def _multiply(self, x: MatrixMultiply) -> None:
        results_ready = max(self.matrix_free, self._results_ready)
        if not x.accumulate:
            results_ready = max(results_ready, self._overwritable(x))
        ready = max(results_ready, self._inputs_ready)
        self.result_wait += results_ready - self.matrix_free
        self.input_wait += ready - results_ready
        start = self._take_tile(ready) if x.next_tile else ready
        cycles = x.rows * x.speed
        self.matrix_free = start + cycles
        self._issued = start
        self.active += cycles
        self.useful += cycles * x.inputs * x.columns / self._settings.array_size**2

    def _overwritable(self, x: MatrixMultiply) -> float:
        """When a product may start whose sums replace others that are still being read.

        Sums arrive after the latency, a row at a time; each row must have been read before.
        """
        start, row_cycles, rows = self._reading[x.accumulator // self._half]
        slower = max(0.0, row_cycles - x.speed) * max(0, rows - 1)
        return start + row_cycles + slower - self._latency

    def _take_tile(self, ready: float) -> float:
        """When the next tile is in the array, for a product that is ready apart from that."""
        shift_start = max(self._arrivals.popleft(), self._shadow_free)
        start = max(ready, shift_start + self._settings.array_size)
        shift = start - max(ready, shift_start) if start > ready else 0.0
        self.weight_shift += shift
        self.weight_stall += start - ready - shift
        self._shadow_free = start
        return start

    def _activate(self, x: Activate) -> None:
        start = max(self.activation_free, self.matrix_free + self._latency)
        # The path to the unified buffer is as wide as the array: one byte for each column.
        row_cycles = max(1.0, x.columns * x.value_bytes / self._settings.array_size)
        self.activation_free = start + x.rows * row_cycles
        self._reading[x.accumulator // self._half] = (start, row_cycles, x.rows)

    def _host_cycles(self, size: int) -> float:
        return size / self._settings.host_bandwidth * self._settings.clock
