"""The contract of quantizable layers: shipped ones keep it, broken ones are found."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from tests.experiments import experiment
from trainer.testing import check_quantized_layer

PAGE = (Path(__file__).parents[2] / "docs" / "own-layer.md").read_text()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 5), (4, 6)),
        (lambda: nn.Conv1d(3, 4, 3), (4, 3, 6)),
        (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 4, 6, 6)),
        (lambda: nn.ConvTranspose2d(3, 4, 3, 2), (4, 3, 6, 6)),
        (lambda: nn.LSTM(5, 6, 2, batch_first=True), (4, 3, 5)),
        (lambda: nn.GRU(5, 6, batch_first=True), (4, 3, 5)),
        (lambda: nn.RNN(5, 6, batch_first=True), (4, 3, 5)),
    ],
    ids=["linear", "conv1d", "conv2d", "transposed", "lstm", "gru", "rnn"],
)
@pytest.mark.parametrize("bits", [8, 3])
def test_shipped_layers_keep_the_contract(make, shape: tuple[int, ...], bits: int) -> None:
    check_quantized_layer(make, torch.randn(shape), bits=bits)


def test_layers_with_other_inputs_keep_the_contract() -> None:
    x, y = torch.randn(2, 4, 3, 8)
    check_quantized_layer(lambda: nn.MultiheadAttention(8, 2, batch_first=True), x, y, y)
    check_quantized_layer(lambda: nn.Embedding(9, 5), torch.randint(9, (4, 3)))


@pytest.mark.slow
def test_the_export_is_checked_on_request() -> None:
    check_quantized_layer(lambda: nn.Linear(6, 5), torch.randn(4, 6), onnx=True)
    with pytest.raises(AssertionError, match="Unexportable: the export to ONNX fails"):
        check_quantized_layer(Unexportable, torch.randn(4, 6), onnx=True)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


class Unexportable(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum() > 0 else -x)


class Keeping(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.kept = (self.weight,)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kept[0].t()


class Detaching(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.detach().t() + self.weight.sum() * 0


class Random(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * torch.rand(())


class Sixteen(Layer):
    def __init__(self) -> None:
        super().__init__()
        self.weight.data = self.weight.data.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.float().t()


class Steep(Layer):
    """Amplifies the rounding of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * 100).sin().t()


class Varying(Layer):
    """Its next object has another shape."""

    made = 0

    def __init__(self) -> None:
        super().__init__()
        Varying.made += 1
        self.bias = nn.Parameter(torch.zeros(Varying.made))


class Stateful(Layer):
    """What it computes depends on something that its state_dict does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.rand(())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (Keeping, r"Keeping: forward\(\) does not read weight"),
        (Detaching, "Detaching: no gradient reaches weight"),
        (Random, "Random: two calls with the same inputs give different outputs"),
        (Sixteen, r"Sixteen: Quantize refuses it: .*weight \(bfloat16"),
        (Steep, "Steep: with 8 bits the outputs differ by"),
        (Varying, "Varying: its file cannot be loaded"),
        (Stateful, "Stateful: loaded from a file, it computes something else"),
    ],
)
def test_broken_layers_are_found(make, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check_quantized_layer(make, torch.randn(8, 6))


def test_the_random_state_stays() -> None:
    before = torch.get_rng_state()
    check_quantized_layer(Layer, torch.ones(4, 6))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_example_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, check = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (settings,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "lowrank.py").write_text(module)
    monkeypatch.syspath_prepend(tmp_path)
    exec(check, {})
    from lowrank import LowRank

    phase = experiment(phases=yaml.safe_load(settings)["phases"]).phases["quantize"]
    phase.check_model(nn.Sequential(LowRank(20, 10, 4), nn.Linear(10, 5)))
    assert phase.notices(nn.Linear(2, 2)) == []
