"""Simulates the cycles of EIE for a matrix-vector product.

Han et al., EIE, ISCA 2016, arXiv:1602.01528, section IV. Every cycle, one activation that is not
zero is broadcast to the queues of all elements, unless one of them is full. Each element works on
the column of the activation at the head of its queue: one entry a cycle, fillers included, and one
cycle for a column without entries, whose pointers have to be read all the same. The activation
leaves the queue when its column is done.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.errors import ConfigError
from trainer.hardware.eie.encoding import EncodedMatrix, Ints, encode
from trainer.hardware.eie.layers import SharedMatrix, random_activations
from trainer.hardware.eie.settings import EieSettings


@dataclass(frozen=True)
class EieCycles:
    """Cycles of one matrix-vector product."""

    cycles: int
    entries: int
    """Entries that the elements process, fillers included."""
    elements: int
    clock: float
    """Hz."""
    broadcasts: int
    """Activations that are not zero."""
    broadcast_stalls: int
    """Cycles in which a broadcast waits because a queue is full."""
    pointer_reads: int
    """Reads from pointer memories. Both pointers of a column come from different banks."""
    word_reads: int
    """Reads of a word from the memories of entries."""

    @property
    def seconds(self) -> float:
        """Time of the product."""
        return self.cycles / self.clock

    @property
    def theoretical_seconds(self) -> float:
        """Time with perfect load balance: each element processes an entry in every cycle."""
        return self.entries / self.elements / self.clock

    @property
    def efficiency(self) -> float:
        """Fraction of cycles in which an element processes an entry, averaged over the elements."""
        return self.entries / (self.elements * self.cycles) if self.cycles else 1.0


def simulate(
    matrix: EncodedMatrix, activations: NDArray[np.floating], settings: EieSettings
) -> EieCycles:
    """Count the cycles of the product of a matrix and a vector.

    Args:
        matrix: Encoded for as many elements as `settings` has.
        activations: [columns]. Only which of them are zero matters.

    Raises:
        ConfigError: The matrix is encoded for another number of elements, or an element's memory
            cannot hold its entries.
        ValueError: The vector has not one value for each column.
    """
    matrix.check_activations(activations)
    if matrix.elements != settings.elements:
        raise ConfigError(
            f"elements={settings.elements}: the matrix is encoded for {matrix.elements}"
        )
    pointers = matrix.pointers
    largest = int((pointers[:, -1] - pointers[:, 0]).max())
    if largest > settings.entries_per_element:
        raise ConfigError(
            f"entries_per_element={settings.entries_per_element:,}: an element has to hold "
            f"{largest:,} entries; use more elements or prune more weights"
        )
    columns = np.flatnonzero(activations)
    counts = matrix.counts()[:, columns].T
    batches = np.bincount(columns // settings.activations_per_batch)
    cycles, stalls = _run(counts, batches, settings)
    starts = pointers[:, columns] - pointers[:, :1]
    return EieCycles(
        cycles=cycles,
        entries=int(counts.sum()),
        elements=settings.elements,
        clock=settings.clock,
        broadcasts=len(columns),
        broadcast_stalls=stalls,
        pointer_reads=2 * counts.size,
        word_reads=_word_reads(starts.T, counts, settings.entries_per_word),
    )


def layer_cycles(
    matrix: SharedMatrix, activation_density: float, settings: EieSettings, seed: int = 0
) -> EieCycles:
    """Cycles of a product with a vector in which a given fraction of activations is not zero.

    Args:
        matrix: Of a compressed model.
        activation_density: Fraction, such as the one that `trainer.hardware.workloads` measures.
        settings: Of the accelerator.
        seed: Decides which activations are zero.

    Raises:
        ConfigError: As `encode` and `simulate`.
    """
    activations = random_activations(matrix.codes.shape[1], activation_density, seed)
    return simulate(encode(matrix.codes, settings), activations, settings)


def _run(counts: Ints, batches: Ints, settings: EieSettings) -> tuple[int, int]:
    """Cycles, and those of them in which a broadcast waits for a full queue.

    Args:
        counts: [broadcasts, elements], the entries of each column.
        batches: The number of broadcasts in each batch; a batch begins when all elements are done
            with the one before it.
    """
    work = np.maximum(counts, 1)
    depth = settings.queue_depth
    start, stalls, first = 0, 0, 0
    for size in batches:
        done = np.full(counts.shape[1], start, np.int64)  # when each element finishes its column
        freed = np.zeros(size, np.int64)  # when a column has left the queues of all elements
        broadcast = start - 1
        for number, column in enumerate(work[first : first + size]):
            wanted = broadcast + 1
            broadcast = max(wanted, freed[number - depth]) if number >= depth else wanted
            stalls += broadcast - wanted
            done = np.maximum(done, broadcast + 1) + column
            freed[number] = done.max()
        if size:
            start = int(done.max()) + settings.pipeline_stages
        first += size
    return start, int(stalls)


def _word_reads(starts: Ints, counts: Ints, per_word: int) -> int:
    """Words that hold the given runs of entries; a word that two columns share is read twice."""
    last = starts + np.maximum(counts, 1) - 1
    words = last // per_word - starts // per_word + 1
    return int(words[counts > 0].sum())
