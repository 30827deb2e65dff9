"""Parameters of the EIE accelerator."""

from dataclasses import dataclass

from trainer.errors import ConfigError


@dataclass(frozen=True)
class EieSettings:
    """Sizes and speeds of an EIE accelerator.

    The defaults are those of Han et al., EIE: Efficient Inference Engine on Compressed Deep Neural
    Network, ISCA 2016, arXiv:1602.01528, sections IV and VI.
    """

    elements: int = 64
    """Processing elements. Element p holds the rows i of the matrix with i mod elements = p."""
    queue_depth: int = 8
    """Activations that wait in the queue of an element, the one in process included."""
    clock: float = 800e6
    """Hz."""
    index_bits: int = 4
    """Bits of a relative row index: more zeros before an entry than it can count need fillers."""
    code_bits: int = 4
    """Bits of an index into the codebook. Code 0 is the value zero, which fillers have."""
    word_bits: int = 64
    """Bits that one read from the memory of an element's entries delivers."""
    activations_per_batch: int = 4096
    """Inputs that the activation memory holds. A longer vector is multiplied in several batches."""
    entries_per_element: int = 131_072
    """Entries that the memory of an element holds: 128 KiB with 8 bits each."""
    pipeline_stages: int = 4
    """Cycles between reading an entry and writing its sum: codebook, multiply, add, write."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name}={value}: it must be above 0")
        for name, largest in (("index_bits", 8), ("code_bits", 16)):
            if getattr(self, name) > largest:
                raise ConfigError(f"{name}={getattr(self, name)}: it must be at most {largest}")
        if self.entries_per_word < 1:
            raise ConfigError(
                f"word_bits={self.word_bits}: it must hold an entry of {self.entry_bits} bits"
            )

    @property
    def entry_bits(self) -> int:
        """Bits of an entry: a relative index and a code."""
        return self.index_bits + self.code_bits

    @property
    def entries_per_word(self) -> int:
        """Entries that one read delivers."""
        return self.word_bits // self.entry_bits
