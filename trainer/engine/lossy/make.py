"""Builds the lossy average that the section `allreduce` of the configuration describes."""

from trainer.config import AllReduceConfig
from trainer.engine.lossy.base import LossyAllReduce
from trainer.engine.lossy.quantized import Codec, Int8Blocks, Quantized, Rounded
from trainer.engine.ring import WIRE_TYPES
from trainer.engine.transport import Transport


def make_lossy(transport: Transport, config: AllReduceConfig) -> LossyAllReduce:
    """The average of a part of the gradients, if `config.is_lossy`."""
    codec: Codec = Int8Blocks() if config.wire == "int8" else Rounded(WIRE_TYPES[config.wire])
    return LossyAllReduce(Quantized(transport, codec), config.feeds_back)
