"""Parameters of the TPU: the first one, and variants that its authors studied."""

from dataclasses import dataclass, replace

from trainer.errors import ConfigError


@dataclass(frozen=True)
class TpuSettings:
    """Sizes and speeds of a TPU.

    The defaults are those of Jouppi et al., In-Datacenter Performance Analysis of a Tensor
    Processing Unit, ISCA 2017, arXiv:1704.04760, section 2 and table 2.
    """

    array_size: int = 256
    """Rows and columns of the matrix unit; a tile of weights has as many."""
    clock: float = 700e6
    """Hz."""
    weight_bandwidth: float = 34e9
    """Bytes per second from the off-chip weight memory."""
    weight_fifo_tiles: int = 4
    """Tiles of weights that wait on the chip for the matrix unit."""
    accumulators: int = 4096
    """Rows of 32-bit sums, each as wide as the matrix unit. Half of them are filled while the
    other half is read."""
    unified_buffer: int = 24 << 20
    """Bytes of on-chip memory for activations."""
    host_bandwidth: float = 14e9
    """Bytes per second to and from the host (PCIe Gen3 x16, figure 1: 14 GiB/s)."""
    packed_kernels: bool = True
    """Whether the matrix unit takes all weights of a filter that fit into a column of the array
    (an assumption), or one position of the kernel in each pass."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"{name}={value}: it must be above 0")
        if self.accumulators < 2:
            raise ConfigError(f"accumulators={self.accumulators}: there must be two at least")

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of 8-bit weights; an incomplete tile is stored padded."""
        return self.array_size**2

    @property
    def tile_cycles(self) -> float:
        """Cycles that the weight memory takes to deliver a tile."""
        return self.tile_bytes / self.weight_bandwidth * self.clock

    @property
    def peak_tops(self) -> float:
        """Multiplications and additions per second, in units of 10^12."""
        return 2 * self.array_size**2 * self.clock / 1e12


TPU_V1 = TpuSettings()
"""The TPU that was deployed in 2015."""

TPU_PRIME = replace(TPU_V1, weight_bandwidth=180e9)
"""TPU' of section 7: GDDR5 instead of DDR3 as weight memory. The paper says more than five times
the bandwidth; 180 GB/s is assumed."""

BUSY_WATTS = 40.0
"""Power of one busy TPU die, as measured by Jouppi et al., table 2."""
