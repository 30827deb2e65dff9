"""Multiply-accumulates, against numbers from the literature and by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

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


class Reader(nn.Module):
    """An LSTM that is called in one of the ways in which it can be."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.lstm = nn.LSTM(4, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        match self.how:
            case "packed":
                lengths = [x.shape[1]] * len(x)
                given = pack_padded_sequence(x, lengths, batch_first=True)
                return self.lstm(given)[0].data
            case "by name":
                return self.lstm(input=x)[0]
        return self.lstm(x[0])[0]


@pytest.mark.parametrize("how", ["packed", "by name", "unbatched"])
def test_an_lstm_counts_however_it_is_called(how):
    assert macs(Reader(how), torch.zeros(1, 7, 4)) == 7 * 4 * 6 * (4 + 6)
