"""Builds the lossy average that the section `allreduce` of the configuration describes."""

from typing import Any, cast

import torch

from trainer.config import AllReduceConfig
from trainer.config.instantiate import build_object
from trainer.engine.lossy.base import Lossy, LossyAllReduce, Part
from trainer.engine.lossy.quantized import Codec, Int8Blocks, Quantized, Rounded
from trainer.engine.ring import WIRE_TYPES, AllReduce, RingAllReduce
from trainer.engine.transport import SocketTransport


def make_lossy(part: Part, whole: AllReduce, config: AllReduceConfig) -> LossyAllReduce:
    """The average of a part of the gradients, if `config.is_lossy`.

    Args:
        part: Of the gradients.
        whole: Averages it in the first steps, which send whole gradients.
        config: Of the run.

    Raises:
        ConfigError: A class of the user's own refuses its settings.
    """
    if config.compression == "none":
        codec: Codec = Int8Blocks() if config.wire == "int8" else Rounded(WIRE_TYPES[config.wire])
        return LossyAllReduce(Quantized(part.transport, codec), config.feeds_back)
    return LossyAllReduce(_build(part, config), config.feeds_back, whole, config.whole_steps)


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
