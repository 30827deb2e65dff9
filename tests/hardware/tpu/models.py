"""Quantized models for the tests, as a quantize phase leaves them."""

import torch
from torch import Tensor, nn

from trainer.engine.world import World
from trainer.phases import Quantize

WORLD = World.single(torch.device("cpu"))


def quantized(model: nn.Module, samples: Tensor, **settings: object) -> nn.Module:
    """The model after a quantize phase that saw the samples in two steps, without learning."""
    phase = Quantize(**settings)
    model.train()
    phase.enter(model, WORLD)
    with torch.no_grad():
        for step in range(2):
            model(samples)
            phase.after_step(model, WORLD, step + 1, 2)
    phase.leave(model)
    return model.eval()
