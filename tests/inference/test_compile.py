"""Compiled models compute the same as dense ones, with each kernel."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import pack_sequence

import trainer
from tests.inference.test_matrix import random_weight
from trainer import artifact
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.inference import chosen_kernels, compile, layer_kernels
from trainer.inference.codes import to_codes
from trainer.inference.kernels import codes, vectors
from trainer.inference.layers import CompiledLayer
from trainer.inference.matrix import compress
from trainer.inference.measure import alternate
from trainer.models import LeNet5, LSTMLanguageModel
from trainer.phases import Quantize


class Everything(nn.Module):
    """Layers of all kinds, with the settings that they may have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(40, 70)
        self.plain = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 2), groups=2)
        self.wide = nn.Conv2d(3, 5, 3, padding="same", dilation=2, bias=False)
        self.sequence = nn.Conv1d(3, 4, 5, stride=3, padding=2)
        self.lstm = nn.LSTM(9, 24, 2)
        self.gru = nn.GRU(9, 20, batch_first=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, 1200]."""
        images = x.view(-1, 3, 20, 20)
        sequences = x[:, :90].view(-1, 10, 9)
        h, (last, cell) = self.lstm(sequences)
        found = (
            self.linear(x.view(len(x), 30, 40)),
            self.plain(images),
            self.conv(x.view(-1, 4, 15, 20)),
            self.wide(images),
            self.sequence(x.view(-1, 3, 400)),
            h,
            last.transpose(0, 1),
            cell.transpose(0, 1),
            *self.gru(sequences)[:1],
        )
        return torch.cat([part.reshape(len(x), -1) for part in found], 1)


def sparse(model: nn.Module, values: int = 15) -> nn.Module:
    """The model with weights that are mostly zero."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                flat = random_weight(len(weight), weight[0].numel(), values)
                weight.copy_(0.3 * flat.view(weight.shape))
            elif "bias" in name:
                weight.copy_(torch.randn(weight.shape))
    return model.eval()


@pytest.fixture
def everything() -> nn.Module:
    return sparse(Everything())


X = torch.relu(torch.randn(6, 1200, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kernel", ["columns", "rows", "codes", "dense"])
@pytest.mark.parametrize("samples", [1, 6])
@pytest.mark.parametrize("threads", [1, 3])
@torch.no_grad()
def test_each_kernel(everything: nn.Module, kernel: str, samples: int, threads: int) -> None:
    expected = everything(X[:samples])
    layers = ["linear", "plain", "conv", "wide", "sequence", "gru.layers.0"]
    layers += [f"lstm.layers.{i}" for i in (0, 1)]
    for_all = kernel in ("rows", "dense")
    for_steps = kernel == "columns"
    chosen = {
        n: kernel if for_all or n == "linear" or (for_steps and ".layers." in n) else "rows"
        for n in layers
    }
    compiled = compile(everything, kernels=chosen, threads=threads)
    found = compiled(X[:samples])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled(X[:samples]), found)
    assert {row.layer: row.kernel for row in layer_kernels(compiled)} == chosen
    again = pickle.loads(pickle.dumps(compiled))
    assert torch.equal(again(X[:samples]), found)


@pytest.mark.parametrize(
    ("values", "kernel"),
    [*product((3, 40, 255, 0), ("columns", "rows")), *((v, "codes") for v in (1, 15, 16, 31))],
)
@torch.no_grad()
def test_codebooks_of_any_size(values: int, kernel: str) -> None:
    model = sparse(nn.Sequential(nn.Linear(1200, 300)), values)
    expected = model(X)
    compiled = compile(model, kernels={"0": kernel}, threads=1)
    torch.testing.assert_close(compiled(X), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(X[0]), expected[0], rtol=1e-5, atol=1e-5)
    assert chosen_kernels(compiled) == {"0": kernel}


@torch.no_grad()
def test_scalar_loops_compute_the_same() -> None:
    """Those of CPUs without AVX-512."""
    weight, x = random_weight(50, 60, 15), X[0, :60].contiguous()
    by_rows, by_columns = compress(weight, "rows"), compress(weight, "columns")
    m, expected = by_rows, (weight @ x).numpy()
    found = [
        vectors._dot_scalar(m.entries, *m.pointers[0, i : i + 2], m.bits, m.table, x.numpy())
        for i in range(50)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    m, out = by_columns, np.zeros(50, np.float32)
    for j in range(60):
        start, stop = m.pointers[0, j : j + 2]
        vectors._add_column_scalar(m.entries, start, stop, m.bits, m.table, x[j].item(), out)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "values"), [(4, 15), (5, 31)])
@pytest.mark.parametrize("vectors", [1, 2])
@torch.no_grad()
def test_scalar_loops_over_codes_compute_the_same(bits: int, values: int, vectors: int) -> None:
    weight, x = random_weight(600 if vectors == 2 else 90, 30, values, 0.6), X[0, :30].numpy()
    matrix = to_codes(weight)
    assert matrix is not None
    assert (matrix.bits, matrix.words.shape[2]) == (bits, vectors)
    size = vectors * (32 // bits) * 16
    out = np.zeros(len(matrix.words) * size, np.float32)
    add_tile, flat = codes._scalar_tile(bits, vectors), matrix.words.reshape(-1)
    for tile, words in enumerate(matrix.words):
        arguments = flat, tile * words.size, np.arange(30), x, 30, matrix.table, out, tile * size
        add_tile(*arguments)
    expected = weight.numpy() @ x
    np.testing.assert_allclose(out[: len(weight)], expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_codes_are_for_layers_of_few_values() -> None:
    """Also without zeros; and not where entries are few, which are faster then."""
    shared = nn.Linear(40, 50)
    shared.weight.copy_(torch.linspace(-1, 1, 16)[torch.randint(16, (50, 40))])
    cases = (
        (shared, True),
        (sparse(nn.Linear(400, 50), 31), True),
        (sparse(nn.Linear(400, 50), 32), False),
        (nn.Linear(40, 50), False),
    )
    for layer, expected in cases:
        compiled = compile(nn.Sequential(layer), samples=torch.rand(1, layer.in_features))
        tried = {kernel for row in layer_kernels(compiled) for kernel in row.microseconds}
        assert ("codes" in tried) == expected
    few = sparse(nn.Linear(400, 50))
    few.weight *= torch.rand(50, 400) < 0.2
    (row,) = layer_kernels(compile(nn.Sequential(few), samples=torch.rand(1, 400)))
    assert set(row.microseconds) == {"columns", "rows", "dense"}


@torch.no_grad()
def test_a_file(tmp_path: Path) -> None:
    model, images = sparse(LeNet5()), torch.rand(2, 1, 28, 28)
    path = tmp_path / "model.dcz"
    path.write_bytes(artifact.encode(model.state_dict(), "fp32"))
    compiled = trainer.inference.compile(LeNet5(), path, images)
    expected = model(images)  # around 100; small ones are differences of such values
    rounding = 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(compiled(images), expected, rtol=1e-5, atol=rounding)
    rows = {row.layer: row for row in layer_kernels(compiled)}
    assert set(rows) == {"conv1", "conv2", "fc1", "fc2"}
    for row in rows.values():  # measured, and the fastest taken
        assert row.kernel == min(row.microseconds, key=lambda name: row.microseconds[name])
    assert not any(parameter.requires_grad for parameter in compiled.parameters())


@torch.no_grad()
def test_chosen_at_the_first_call() -> None:
    compiled = compile(sparse(LSTMLanguageModel(hidden=32)))
    assert chosen_kernels(compiled) == {}
    tokens = torch.randint(96, (1, 5))
    compiled(tokens)
    assert set(chosen_kernels(compiled)) == {"lstm.layers.0", "decoder"}


@torch.no_grad()
def test_an_empty_batch_chooses_nothing() -> None:
    compiled = compile(sparse(nn.Sequential(nn.Linear(20, 30))), samples=torch.rand(0, 20))
    assert compiled(torch.rand(0, 20)).shape == (0, 30)
    assert chosen_kernels(compiled) == {}
    compiled(torch.rand(1, 20))
    assert set(chosen_kernels(compiled)) == {"0"}


@torch.no_grad()
def test_integers() -> None:
    """Where quantization left a grid, and inputs have a range."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(3200, 10))
    images, world = X.view(-1, 3, 20, 20), World.single(torch.device("cpu"))
    sparse(model)
    phase = Quantize()
    phase.enter(model, world)
    model.train()(images)
    phase.after_step(model, world, 1, 1)
    phase.leave(model)
    expected = model.eval()(images)
    state = model.state_dict()
    for kernel in ("int8", "rows", "dense"):
        fresh = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(3200, 10))
        compiled = compile(fresh, state, kernels={"0": kernel, "2": kernel})
        # An input between two integers may be rounded to the other one.
        torch.testing.assert_close(compiled(images), expected, rtol=0.01, atol=0.05)
        assert torch.equal(pickle.loads(pickle.dumps(compiled))(images), compiled(images))
    convolution = compile(pickle.loads(pickle.dumps(model)), kernels={"0": "int8"})[0]
    with pytest.raises(RuntimeError, match="0 x 1 are smaller than the kernel, 3 x 3"):
        convolution(torch.rand(1, 3, 0, 1))
    compressed = layer_kernels(compile(model, kernels={"0": "rows", "2": "columns"}))
    assert all(row.code_bits is not None and row.code_bits <= 8 for row in compressed)


def test_what_stays() -> None:
    model = nn.Sequential(nn.Linear(9, 9), nn.Conv3d(2, 2, 2), nn.LSTM(3, 3, bidirectional=True))
    assert layer_kernels(compile(model)) == []


def test_refuses() -> None:
    model = nn.Sequential(nn.Linear(20, 30))
    sparse(model)
    with pytest.raises(ConfigError, match="'1' is not a compressed layer; there are 0"):
        compile(pickle.loads(pickle.dumps(model)), kernels={"1": "rows"})
    with pytest.raises(ConfigError, match="there are columns, rows, codes, dense"):
        compile(pickle.loads(pickle.dumps(model)), kernels={"0": "int8"})
    with pytest.raises(ConfigError, match="threads=0"):
        compile(model, threads=0)
    with pytest.raises(RuntimeError, match="size mismatch"):
        compile(nn.Sequential(nn.Linear(20, 31)), model.state_dict())
    compiled = compile(model)
    with pytest.raises(TypeError, match="float32"):
        compiled(torch.rand(2, 20, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="no gradients"):
        compiled(torch.rand(2, 20, requires_grad=True))
    with pytest.raises(ConfigError, match=r"^0 has weights in torch.bfloat16 .* model.float\(\)"):
        compile(nn.Sequential(nn.Linear(20, 30)).bfloat16())
    broken = nn.Sequential(nn.Linear(20, 30))
    nn.init.constant_(broken[0].weight, torch.nan)
    with pytest.raises(ConfigError, match=r"^0: the weights have NaN"):
        compile(broken)


def test_refuses_a_damaged_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"nothing of that kind")
    with pytest.raises(artifact.ArtifactError, match=r"model.safetensors: no .safetensors file"):
        compile(LeNet5(), path)


@pytest.mark.parametrize(
    ("name", "size", "kernel", "message"),
    [
        ("linear", (2, 5), "columns", "last dimension must be 40"),
        ("linear", (9, 99), "rows", "last dimension must be 40"),
        ("linear", (), "rows", "last dimension must be 40"),
        ("plain", (2, 9, 20, 20), "rows", r"\[N, 3, height, width\]"),
        ("plain", (3, 20), "rows", r"\[N, 3, height, width\]"),
        ("sequence", (1, 1, 20), "rows", r"\[N, 3, length\]"),
        ("lstm", (7, 2, 8), "rows", "last dimension must be 9"),
        ("lstm", (7, 2, 1, 9), "rows", "2 or 3 dimensions"),
    ],
)
@torch.no_grad()
def test_inputs_of_another_size_are_refused(
    everything: nn.Module, name: str, size: tuple[int, ...], kernel: str, message: str
) -> None:
    """Kernels do not check it: they would read other memory."""
    layers = [f"{name}.layers.{i}" for i in (0, 1)] if name == "lstm" else [name]
    layer = compile(everything, kernels=dict.fromkeys(layers, kernel)).get_submodule(name)
    with pytest.raises(RuntimeError, match=message):
        layer(torch.rand(size))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("kernel", ["rows", "dense"])
@torch.no_grad()
def test_packed_sequences(kind: type[nn.LSTM | nn.GRU], kernel: str) -> None:
    model = sparse(kind(9, 24, 2))
    packed = pack_sequence([torch.rand(n, 9) for n in (2, 5, 1, 5)], enforce_sorted=False)
    state: Any = torch.rand(2, 4, 24)
    state = (state, torch.rand(2, 4, 24)) if kind is nn.LSTM else state
    expected = model(packed), model(packed, state)
    kernels = {f"layers.{i}": kernel for i in (0, 1)}
    compiled = compile(model, samples=packed, kernels=kernels)
    found = compiled(packed), compiled(packed, state)
    for (out, end), (expected_out, expected_end) in zip(found, expected, strict=True):
        torch.testing.assert_close(out.data, expected_out.data, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(end, expected_end, rtol=1e-5, atol=1e-5)
        assert torch.equal(out.batch_sizes, packed.batch_sizes)
        assert torch.equal(out.unsorted_indices, packed.unsorted_indices)
    in_order = pack_sequence([torch.rand(n, 9) for n in (5, 2)])
    torch.testing.assert_close(compiled(in_order)[0].data, sparse(kind(9, 24, 2))(in_order)[0].data)


@torch.no_grad()
def test_states_of_another_shape_are_refused(everything: nn.Module) -> None:
    lstm, x = compile(everything).lstm, torch.rand(7, 3, 9)
    for shape in ((1, 3, 24), (2, 4, 24), (2, 3, 25)):
        with pytest.raises(RuntimeError, match=r"layers, N, hidden\], here \[2, 3, 24\]"):
            lstm(x, (torch.zeros(shape), torch.zeros(shape)))
    packed = pack_sequence([torch.rand(n, 9) for n in (5, 2, 1)])
    for sequences in (2, 4):
        with pytest.raises(RuntimeError, match=r"layers, N, hidden\], here \[2, 3, 24\]"):
            lstm(packed, (torch.zeros(2, sequences, 24),) * 2)
    with pytest.raises(TypeError, match="float32"):
        lstm(x, (torch.zeros(2, 3, 24).double(),) * 2)


def test_a_weight_can_be_read(everything: nn.Module) -> None:
    weight = everything.linear.weight.detach().clone()
    assert torch.equal(compile(everything).linear.weight, weight)


def test_hooks_are_kept() -> None:
    model, seen = sparse(nn.Sequential(nn.Linear(20, 30))), []
    model[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    compile(model, kernels={"0": "rows"})(torch.rand(2, 20))
    assert seen == [(2, 30)]


@torch.no_grad()
def test_hooks_with_keywords_are_kept() -> None:
    model, x = sparse(nn.Sequential(nn.Linear(20, 30))), torch.rand(2, 20)
    model[0].register_forward_pre_hook(
        lambda _, args, named: ((args[0] + 1,), named), with_kwargs=True
    )
    model[0].register_forward_hook(lambda _, args, named, out: 2 * out, with_kwargs=True)
    expected = model(x)
    torch.testing.assert_close(compile(model, kernels={"0": "rows"})(x), expected)


@pytest.mark.parametrize(
    "samples", [(X[:2, :40], X[:2, 40:80]), {"x": X[:2, :40], "y": X[:2, 40:80]}]
)
def test_samples_of_several_inputs(samples: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(40, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.fc(x + y)

    assert chosen_kernels(compile(sparse(Two()), samples=samples)).keys() == {"fc"}


class _ReadsSettings(nn.Module):
    """Reads the settings of its layers, and calls them by keyword, as the code of others does."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.fc = nn.LSTM(9, 24, 2, batch_first=True), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.lstm.flatten_parameters()
        directions = 2 if self.lstm.bidirectional else 1
        zero = x.new_zeros(directions * self.lstm.num_layers, len(x), self.lstm.hidden_size)
        h, _ = self.lstm(input=x.view(len(x), -1, self.lstm.input_size), hx=(zero, zero))
        return self.fc(input=h.reshape(-1, self.fc.in_features))


@torch.no_grad()
def test_settings_and_keywords_are_those_of_torch() -> None:
    model, x = sparse(_ReadsSettings()), torch.rand(3, 36)
    expected = model(x)
    torch.testing.assert_close(compile(model)(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_masks_of_torch_are_taken_over() -> None:
    """Those of torch.nn.utils.prune, which hooks apply. Other hooks that make weights stay."""
    model, x = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 9), nn.LSTM(9, 8)), torch.rand(4, 20)
    prune.l1_unstructured(model[0], "weight", 0.8)
    prune.l1_unstructured(model[0], "bias", 0.5)
    prune.l1_unstructured(model[2], "weight_hh_l0", 0.8)
    model[1].weight[:, 1:] = 0
    nn.utils.spectral_norm(model[1])
    expected = model.eval()(x)[0]
    compiled = compile(model)
    torch.testing.assert_close(compiled(x)[0], expected)
    assert [row.layer for row in layer_kernels(compiled)] == ["0", "2.layers.0"]


def double(module: nn.Module, args: Any, out: Tensor) -> Tensor:
    return 2 * out


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@torch.no_grad()
def test_encoder_layers_of_torch_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their fused kernel in evaluation would decode the weights at each call."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = sparse(nn.TransformerEncoder(layer, 1)), torch.rand(2, 3, 8)
    padded = torch.tensor([[False, False, False], [False, True, True]])
    model.layers[0].linear1.register_forward_hook(double)
    expected = model(x), model(x, src_key_padding_mask=padded)[~padded]
    kernels = {f"layers.0.linear{i}": "rows" for i in (1, 2)}
    measured = compile(pickle.loads(pickle.dumps(model)), samples=x)
    assert chosen_kernels(measured).keys() == kernels.keys()  # so they were called
    compiled = compile(model, kernels=kernels)
    monkeypatch.setattr(CompiledLayer, "weight", property(lambda _: pytest.fail("decoded")))
    found = compiled(x), compiled(x, src_key_padding_mask=padded)[~padded]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="not nested"):
        compiled.layers[0].linear1(torch.nested.as_nested_tensor([*x]))


@torch.no_grad()
def test_threads_may_make_the_first_call_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = sparse(nn.Sequential(nn.Linear(20, 30))), torch.rand(1, 20)
    monkeypatch.setattr("trainer.inference.layers._SECONDS", 0.0)
    for _ in range(5):
        compiled = compile(pickle.loads(pickle.dumps(model)))
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(compiled, [x] * 4))
        assert all(torch.equal(out, found[0]) for out in found)


def test_alternating() -> None:
    order: list[str] = []
    times = alternate({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0, 5)
    assert order == ["a", "b"] * 8
    assert [len(taken) for taken in times.values()] == [5, 5]
