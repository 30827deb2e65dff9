"""Builds the lossy average that the section `allreduce` of the configuration describes."""

from collections.abc import Sequence
from typing import Any, cast

import torch

from trainer.config import AllReduceConfig
from trainer.config.instantiate import build_object
from trainer.engine.lossy.base import Lossy, LossyAllReduce, Part
from trainer.engine.lossy.quantized import Codec, Int8Blocks, Quantized, Rounded
from trainer.engine.ring import WIRE_TYPES, RingAllReduce
from trainer.engine.transport import SocketTransport


def make_lossy(parts: Sequence[Part], config: AllReduceConfig) -> list[LossyAllReduce]:
    """The averages of parts of the gradients, in their order; `config.is_lossy` must hold.

    Raises:
        ConfigError: A class of the user's own refuses its settings.
    """
    feeds_back = config.feeds_back
    if config.compression != "none":
        return [
            LossyAllReduce(_build(part, config), feeds_back, part.all_reduce, config.whole_steps)
            for part in parts
        ]
    if not parts:
        return []
    codec: Codec = Int8Blocks() if config.wire == "int8" else Rounded(WIRE_TYPES[config.wire])
    quantized = Quantized(parts[0].transport, codec)  # one for all: they share its work memory
    return [LossyAllReduce(quantized, feeds_back) for _ in parts]


def check_compression(config: AllReduceConfig) -> None:
    """Raise ConfigError for a class of the user's own that cannot be built."""
    if config.compression != "none":
        transport = SocketTransport(0, 1, [], 0.0)
        all_reduce = RingAllReduce(transport, torch.float32)
        _build(Part([torch.Size((8, 8))], transport, all_reduce), config)


def _build(part: Part, config: AllReduceConfig) -> Lossy:
    settings = _target(config)
    lossy: Any = build_object("allreduce.compression", settings, object, context={"part": part})
    return cast(Lossy, lossy)


def _target(config: AllReduceConfig) -> dict[str, Any]:
    match config.compression:
        case "powersgd":
            return {"_target_": "trainer.engine.lossy.powersgd.PowerSGD", "rank": config.rank}
        case "topk":
            return {"_target_": "trainer.engine.lossy.topk.TopK", "fraction": config.fraction}
        case own:
            return dict(own)
