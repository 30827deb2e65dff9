"""What one forward pass costs, in multiply-accumulates of weights that are not zero."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@torch.no_grad()
def macs(model: nn.Module, sample: Tensor) -> int:
    """Multiply-accumulates of linear, convolutional and recurrent layers for one sample.

    Args:
        model: with plain weights; comes back in the mode that it was in.
        sample: inputs [1, ...], on the model's device.

    A weight of a linear layer or a convolution counts once per position of the output, one of an
    LSTM, GRU or RNN once per time step; zeros do not count. Other modules count as free.
    """
    total = 0

    def count(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        nonlocal total
        if isinstance(module, nn.RNNBase):
            steps = _time_steps(module, args[0] if args else named["input"])
            weights = [p for name, p in module.named_parameters() if name.startswith("weight")]
            total += steps * sum(int(weight.count_nonzero()) for weight in weights)
            return
        assert isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
        outputs = module.weight.shape[0]
        total += int(module.weight.count_nonzero()) * (output.numel() // outputs)

    counted = (nn.Linear, nn.RNNBase, *_CONVOLUTIONS)
    hooks = [
        m.register_forward_hook(count, with_kwargs=True)
        for m in model.modules()
        if isinstance(m, counted)
    ]
    training = model.training
    model.eval()
    try:
        model(sample)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total


def _time_steps(module: nn.RNNBase, inputs: Tensor | PackedSequence) -> int:
    if isinstance(inputs, PackedSequence):
        return len(inputs.batch_sizes)
    batched = inputs.dim() == 3
    return inputs.shape[1 if batched and module.batch_first else 0]
