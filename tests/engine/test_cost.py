"""Multiply-accumulates, against numbers from the literature and by hand."""

import torch

from trainer.engine.cost import macs
from trainer.models import LeNet5, LeNet300, LSTMLanguageModel


def test_a_linear_weight_counts_once_and_a_zero_never():
    model = LeNet300()
    sample = torch.zeros(1, 1, 28, 28)
    assert macs(model, sample) == 266_200
    with torch.no_grad():
        model.fc1.weight[:10] = 0
    assert macs(model, sample) == 266_200 - 10 * 784
    assert model.training


def test_a_convolution_counts_per_position():
    # conv1 20x5x5 on 24x24, conv2 50x20x5x5 on 8x8, fc1 800x500, fc2 500x10
    expected = 500 * 576 + 25_000 * 64 + 400_000 + 5_000
    assert macs(LeNet5(), torch.zeros(1, 1, 28, 28)) == expected


def test_a_recurrent_weight_counts_per_time_step():
    model = LSTMLanguageModel(vocabulary=10, embedding=4, hidden=6)
    steps, gates = 7, 4
    assert macs(model, torch.zeros(1, steps, dtype=torch.long)) == steps * (
        gates * 6 * (4 + 6) + 6 * 10
    )
