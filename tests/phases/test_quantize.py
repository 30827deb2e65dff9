"""The phase quantize: the quantized model, preserved properties, and refused settings."""

import copy
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from trainer import artifact
from trainer.compress.codebooks import codebook_of
from trainer.compress.counts import counts
from trainer.compress.quantize import activation_quantizers
from trainer.compress.rewrite import restore
from trainer.compress.select import weights
from trainer.config import FitConfig
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.experiment import check_order
from trainer.models import LSTMLanguageModel, ResNetCifar
from trainer.phases import Prune, Quantize, Retrain, Share, Train
from trainer.testing.ranks import run_ranks

WORLD = World.single(torch.device("cpu"))
TRAINING = FitConfig(epochs=1)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.BatchNorm1d(30), nn.Linear(30, 10))


def run(phase: Any, model: nn.Module, inputs: Tensor, steps: int = 5, lr: float = 1e-3) -> None:
    phase.enter(model, WORLD)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.01)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs).square().sum().backward()
        optimizer.step()
        phase.after_step(model, WORLD, step + 1, steps)
    phase.leave(model)
    model.eval()


def integers(model: nn.Module, name: str) -> Tensor:
    state = model.state_dict()
    scale = state[f"{name}_quantizer.scale"]
    weight = state[name]
    made = weight / (scale.view(-1, *[1] * (weight.ndim - 1)) if scale.ndim else scale)
    assert torch.allclose(made, made.round(), atol=1e-3)
    return made.round()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 1}, "bits=1: it must be 2 to 8 bits"),
        ({"bits": 9}, "bits=9"),
        ({"activations": 1}, "activations=1: it must be 2 to 8 bits"),
        ({"overrides": {"fc": 16}}, "overrides.fc=16"),
        ({"momentum": 0.0}, "momentum=0.0: it must be above 0"),
        ({"keep": ["ranges"]}, "keep=ranges: it must be one of zeros, sharing"),
        ({"keep": ["sharing"]}, "per_channel=true with keep=\\[sharing\\].* set per_channel=false"),
        ({"fit": FitConfig(epochs=0)}, "activations=8 with fit.epochs=0"),
        ({"equalize": True}, "equalize=true with samples=0"),
        (
            {"equalize": True, "samples": 8, "keep": ["sharing"], "per_channel": False}
            | {"rounding": "nearest"},
            "equalize=true with keep=\\[sharing\\]",
        ),
        ({"activations": None, "outputs": ["0"]}, "outputs=\\['0'\\] with activations=null"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Quantize(**({"fit": TRAINING} | settings))


def test_settings_that_do_not_fit_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match="'conv' matches no weight"):
        Quantize(fit=TRAINING, overrides={"conv": 4}).check_model(net())
    gru = nn.ModuleDict({"gru": nn.GRU(3, 4, bidirectional=True)})
    said = r"cannot be quantized: gru.weight_ih_l0 \(of GRU\), .* exempt=\[gru\], or exempt=\[unsup"
    with pytest.raises(ConfigError, match=said):
        Quantize(fit=TRAINING).check_model(gru)
    gru.register_parameter("table", nn.Parameter(torch.ones(2, 2)))
    with pytest.raises(ConfigError, match=r"table \(of ModuleDict\).* exempt=\[table, gru\]"):
        Quantize(fit=TRAINING).check_model(gru)
    with pytest.raises(ConfigError, match="no weight is left; none can be quantized"):
        Quantize(fit=TRAINING, exempt=["unsupported"]).check_model(gru)
    shared = Quantize(fit=TRAINING, per_channel=False, keep=["zeros", "sharing"])
    folded = nn.Sequential(nn.Flatten(), nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ConfigError, match=r"fold=true with keep=\[sharing\].* set fold=false"):
        shared.check_model(folded)
    model = net()
    before = str(model)
    shared.check_model(model)  # its batch norm follows a ReLU: nothing would be folded
    Quantize(fit=TRAINING, overrides={"0": 4, "3.weight": 2}).check_model(model)
    assert str(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_of_other_types_are_refused_by_name(dtype: torch.dtype, device: str) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4).to(dtype)).to(device)
    name = str(dtype).removeprefix("torch.")
    said = rf"cannot be quantized: 1\.weight \({name}; convert .*\.float\(\)\).* exempt=\[1\]"
    with pytest.raises(ConfigError, match=said):
        Quantize(fit=TRAINING).check_model(model)
    Quantize(fit=TRAINING, exempt=["1"]).check_model(model)


def test_nothing_may_train_after_it() -> None:
    quantize = Quantize(fit=TRAINING)
    for later in (
        Train(fit=TRAINING),
        Retrain(fit=TRAINING),
        Share(fit=TRAINING),
        Quantize(fit=TRAINING),
    ):
        with pytest.raises(ConfigError, match="would destroy the quantization made by 'q'"):
            check_order({"q": quantize, "later": later})
    sharing = Share(4, fit=FitConfig())
    with pytest.raises(ConfigError, match="would destroy the sharing"):
        check_order({"share": sharing, "q": quantize})
    keeping = Quantize(fit=TRAINING, per_channel=False, keep=["zeros", "sharing"])
    check_order({"share": sharing, "q": keeping})


def test_nothing_may_be_clustered_or_rounded_after_it_even_without_training() -> None:
    rounding = Quantize(fit=FitConfig(), activations=None)
    for later in (Share(4, fit=FitConfig()), rounding):
        with pytest.raises(ConfigError, match="destroy the quantization made by 'q', even"):
            check_order({"q": rounding, "later": later})
    with pytest.raises(ConfigError, match=r"destroy the sharing made by 's'.*keep=\[zeros,sharing"):
        check_order({"s": Share(4, fit=FitConfig()), "q": rounding})
    check_order(
        {"q": rounding, "prune": Prune(0.5, fit=FitConfig()), "idle": Train(fit=FitConfig())}
    )


@pytest.mark.parametrize("size", [2, 4])
def test_ranges_are_those_of_one_worker(size: int) -> None:
    torch.manual_seed(0)
    batches = torch.randn(4, 3, 20) * torch.tensor([3.0, 1.0, 2.0, 1.0]).view(4, 1, 1)

    def ranges(world: World) -> list[list[float]]:
        model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        for number, parameter in enumerate(model.parameters()):  # ranks are threads of one seed
            generator = torch.Generator().manual_seed(number)
            parameter.data = torch.randn(parameter.shape, generator=generator)
        phase = Quantize(fit=TRAINING, momentum=0.3)
        phase.enter(model, world)
        model.train()
        for step, batch in enumerate(batches):
            # Three samples for four workers: one of them sees nothing.
            for share in batch.tensor_split(world.size)[world.rank :][:1]:
                if len(share):
                    model(share)
            phase.after_step(model, world, step + 1, len(batches))
        phase.leave(model)
        return [quantizer.range.tolist() for quantizer in activation_quantizers(model)]

    alone = torch.tensor(ranges(WORLD))
    found = run_ranks(size, ranges)
    assert all(one == found[0] for one in found)
    assert torch.equal(torch.tensor(found[0])[0], alone[0])
    torch.testing.assert_close(torch.tensor(found[0]), alone, rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_never_called_keeps_its_inputs() -> None:
    class Attending(nn.Module):
        """An attention with a vdim is left as it is, and uses the weight of its out_proj."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, vdim=8, kdim=6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = self.attention(x, x[..., :6], x, need_weights=False)[0]
            return made

    torch.manual_seed(0)
    model, inputs = Attending(), torch.randn(2, 3, 8)
    exempt = ["attention.?_proj_weight"]
    run(Quantize(fit=TRAINING, exempt=exempt), model, inputs)
    assert activation_quantizers(model) == []
    integers(model, "attention.out_proj.weight")
    again = restore(Attending(), model.state_dict()).eval()
    assert torch.equal(again(inputs), model(inputs))
    layer = model.attention.out_proj
    x = torch.randn(4, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_all_unsupported_weights_are_exempt_at_once_and_listed() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3))
        model.register_module("gru", nn.GRU(3, 4, bidirectional=True))
        model.register_parameter("table", nn.Parameter(torch.ones(2, 2)))
        model.forward = lambda x: nn.Sequential.forward(model[:2], x)  # type: ignore[method-assign]
        return model

    model, inputs = build(), torch.randn(5, 6)
    phase = Quantize(fit=TRAINING, exempt=["0", "unsupported"])
    phase.check_model(model)
    (line,) = phase.notices(model)
    assert line.startswith("not quantized: table (of Sequential), gru.weight_ih_l0 (of GRU), gru.")
    assert "0.weight" not in line
    assert Quantize(fit=TRAINING, exempt=["gru", "table"]).notices(model) == []
    assert Quantize(fit=TRAINING, exempt=["gru", "table", "unsupported"]).notices(model) == []
    run(phase, model, inputs)
    assert [name for name in model.state_dict() if name.endswith("width")] == [
        "1.weight_quantizer.width",
        "1.input_quantizer.width",
    ]
    assert torch.equal(restore(build(), model.state_dict()).eval()(inputs), model(inputs))


class LowRank(nn.Module):
    """A layer of one's own, with two weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, inputs))
        self.up = nn.Parameter(torch.randn(outputs, 2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.down.t() @ self.up.t()


@pytest.mark.parametrize("layer", [LowRank, f"{__name__}.LowRank"])
def test_weights_of_own_layers_are_quantized_on_request(layer: Any) -> None:
    def build() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(LowRank(6, 5), nn.ReLU(), LowRank(5, 3))

    model, inputs = build(), torch.randn(7, 6)
    with pytest.raises(ConfigError, match=r"0.down \(of LowRank\)"):
        Quantize(fit=TRAINING).check_model(model)
    phase = Quantize(4, {"*.up": 3}, fit=TRAINING, layers=[layer], outputs=["2"])
    phase.check_model(model)
    run(phase, model, inputs)
    assert integers(model, "0.down").abs().max() == 7
    assert integers(model, "2.up").abs().max() == 3
    assert len(activation_quantizers(model)) == 3  # one for each input, and an output
    content = artifact.encode({k: v.clone() for k, v in model.state_dict().items()})
    again = restore(build(), artifact.loads(content)).eval()
    assert torch.equal(again(inputs), model(inputs))
    kinds = {layer["name"]: layer["kind"] for layer in artifact.describe(content).layers}
    assert kinds["0.down"] == kinds["2.up"] == "quantized"


@pytest.mark.parametrize("layer", ["nowhere.Layer", "torch.nn.functional.relu", 3])
def test_invalid_layers_are_refused(layer: Any) -> None:
    with pytest.raises(ConfigError, match="layers"):
        Quantize(fit=TRAINING, layers=[layer])


class Conv1D(nn.Module):
    """That of transformers, which is a Linear with a transposed weight."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf, self.nx = outputs, inputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, self.nx), self.weight).view(*x.shape[:-1], self.nf)


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **settings: Any) -> None:
        super().__init__()
        self.rnn = kind(8, 6, num_layers=2, **settings)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.rnn(x)[0]
        return made


class Attention(nn.Module):
    def __init__(self, crossed: bool = False) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.crossed = crossed

    def forward(self, x: Tensor) -> Tensor:
        other = x.flip(1) if self.crossed else x
        made: Tensor = self.attention(x, other, other)[0]
        return made


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


@pytest.mark.parametrize(
    ("build", "shape", "names"),
    [
        (lambda: Recurrent(nn.GRU), (3, 4, 8), ["rnn.layers.0.ih", "rnn.layers.1.hh"]),
        (lambda: Recurrent(nn.RNN, nonlinearity="relu"), (3, 4, 8), ["rnn.layers.1.ih"]),
        (Attention, (3, 4, 8), ["attention.in_proj", "attention.out_proj"]),
        (lambda: Attention(crossed=True), (3, 4, 8), ["attention.in_proj"]),
        (encoder, (3, 4, 8), ["layers.1.self_attn.in_proj", "layers.0.linear1"]),
        (lambda: nn.Sequential(Conv1D(5, 8), nn.ReLU(), Conv1D(5, 5)), (3, 8), ["0", "2"]),
        (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3, 2)), (3, 3, 5), ["0"]),
        (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)), (3, 4, 5, 5), ["0"]),
        (lambda: nn.Sequential(nn.ConvTranspose3d(3, 4, 3)), (3, 3, 5, 3, 3), ["0"]),
    ],
    ids=["gru", "rnn", "attention", "cross", "encoder", "conv1d", "ct1", "ct2", "ct3"],
)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.slow
def test_layers_of_many_kinds_compute_nearly_the_same_and_are_decoded_bit_for_bit(
    build: Any, shape: tuple[int, ...], names: list[str], per_channel: bool
) -> None:
    torch.manual_seed(0)
    model, inputs = build(), torch.randn(shape)
    initial = copy.deepcopy(model).eval()
    phase = Quantize(fit=TRAINING, per_channel=per_channel)
    phase.check_model(model)
    run(phase, model, inputs, 1, lr=0.0)
    expected = initial(inputs)
    assert (model(inputs) - expected).abs().max() < 0.05 * expected.abs().max()
    for name in names:
        integers(model, f"{name}.weight")
        assert f"{name}.input_quantizer.range" in model.state_dict()
    content = artifact.encode({k: v.clone() for k, v in model.state_dict().items()})
    again = restore(build(), artifact.loads(content)).eval()
    assert torch.equal(again(inputs), model(inputs))
    assert list(again.state_dict()) == list(model.state_dict())


def test_a_conv1d_that_is_not_quantized_keeps_its_weight() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(Conv1D(6, 6), nn.ReLU(), Conv1D(6, 6))

    model, inputs = build(), torch.randn(3, 6)
    run(Quantize(fit=TRAINING, exempt=["0"]), model, inputs)
    again = restore(build(), model.state_dict()).eval()
    assert type(again[0]) is Conv1D
    assert type(again[2]) is nn.Linear
    assert torch.equal(again(inputs), model(inputs))
    tied = nn.Sequential(Conv1D(6, 6), Conv1D(6, 6))
    tied[1].weight = tied[0].weight
    with pytest.raises(ConfigError, match=r"0.weight \(of Conv1D, tied to another weight\)"):
        Quantize(fit=TRAINING).check_model(tied)


@pytest.mark.parametrize(("bits", "per_channel"), [(8, True), (4, False), (2, True)])
def test_weights_end_on_their_grid(bits: int, per_channel: bool) -> None:
    model = net()
    phase = Quantize(bits, {"3": 8}, fit=TRAINING, per_channel=per_channel)
    run(phase, model, torch.randn(8, 20))
    assert integers(model, "0.weight").abs().max() == (1 << (bits - 1)) - 1
    assert integers(model, "3.weight").abs().max() > 63
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert "parametrizations" not in str(list(model.state_dict()))
    ranges = [quantizer.range for quantizer in activation_quantizers(model)]
    assert len(ranges) == 2
    assert all(extent[0] <= 0 < extent[1] for extent in ranges)


def test_without_training_only_weights_are_rounded() -> None:
    model = net()
    before = copy.deepcopy(model)
    run(Quantize(fit=FitConfig(), activations=None, fold=False), model, torch.randn(8, 20), 0)
    assert not activation_quantizers(model)
    for name in ("0.weight", "3.weight"):
        error = model.get_parameter(name) - before.get_parameter(name)
        assert error.abs().max() < model.state_dict()[f"{name}_quantizer.scale"].max()


def test_zeros_and_clusters_are_still_there() -> None:
    model = net()
    nn.init.normal_(model[2].weight)
    Prune(0.5, fit=FitConfig()).enter(model, WORLD)
    zeros = {name: places[0].value == 0 for name, places in weights(model).items()}
    run(Share(3, fit=FitConfig(), init="density"), model, torch.randn(8, 20), 0)
    books = {name: codebook_of(places[0].value) for name, places in weights(model).items()}
    phase = Quantize(8, fit=TRAINING, per_channel=False, keep=["zeros", "sharing"])
    entered = copy.deepcopy(model)
    phase.enter(entered, WORLD)
    # Two codebooks, and the vectors of norm and biases, which were not shared.
    assert counts(entered).learnable == 8 + 8 + 30 + 60 + 10
    run(phase, model, torch.randn(8, 20))
    for name, places in weights(model).items():
        value = places[0].value
        book = books[name]
        assert book is not None
        assert bool((value[zeros[name]] == 0).all())
        assert 1 < len(value[value != 0].unique()) <= 8
        for code in range(1, 9):  # equal before, equal after
            assert len(value[book.codes == code].unique()) == 1
        integers(model, name)


def test_pruned_weights_stay_zero_with_a_scale_per_channel() -> None:
    model = net()
    Prune(0.9, fit=FitConfig()).enter(model, WORLD)
    zeros = model[0].weight == 0
    run(Quantize(4, fit=TRAINING), model, torch.randn(8, 20))
    assert bool((model[0].weight[zeros] == 0).all())
    assert 0 < integers(model, "0.weight").count_nonzero() <= 60


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (lambda: ResNetCifar(8, in_channels=1), torch.randn(8, 1, 8, 8)),
        (lambda: LSTMLanguageModel(11, 6, 6, tied=True), torch.randint(11, (4, 5))),
    ],
)
@pytest.mark.slow
def test_a_decoded_file_gives_the_same_outputs_bit_for_bit(build, inputs: Tensor) -> None:
    torch.manual_seed(0)
    model = build()
    run(Prune(0.6, fit=FitConfig()), model, inputs, 0)
    run(Quantize(5, {"*fc*": 3} if "Res" in str(type(model)) else {}, fit=TRAINING), model, inputs)
    state = model.state_dict()
    through_disk = safetensors.torch.load(safetensors.torch.save(dict(_untied(state))))
    content = artifact.encode(through_disk)
    decoded = restore(build(), artifact.loads(content)).eval()
    assert torch.equal(decoded(inputs), model(inputs))
    for name, tensor in decoded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    kinds = [layer["kind"] for layer in artifact.describe(content).layers]
    assert "quantized" in kinds
    assert "pruned" not in kinds
    assert artifact.describe(content).parameters == counts(model).parameters


class Scaled(nn.Sequential):
    """Ends in a factor without a dimension."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(20, 30), nn.Linear(30, 10))
        self.factor = nn.Parameter(torch.tensor(1 / 3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) * self.factor
        return out


def test_what_is_not_quantized_is_left_as_its_file_has_it() -> None:
    torch.manual_seed(0)
    model, inputs = Scaled(), torch.randn(8, 20)
    run(Share(3, fit=FitConfig()), model, inputs, 0)
    keep = ["zeros", "sharing"]
    run(Quantize(4, fit=TRAINING, exempt=["1"], keep=keep, per_channel=False), model, inputs)
    content = artifact.encode(model.state_dict())
    decoded = restore(Scaled(), artifact.loads(content)).eval()
    for name, tensor in decoded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert torch.equal(decoded(inputs), model(inputs))
    layers = {layer["name"]: layer for layer in artifact.describe(content).layers}
    assert (layers["1.weight"]["kind"], layers["1.weight"]["bits"]) == ("shared", 3)
    assert layers["factor"]["bits"] <= 16


def _untied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def test_entering_again_and_loading_continues_with_the_same_bits() -> None:
    inputs = torch.randn(8, 20)
    phase = Quantize(4, fit=TRAINING)

    def steps(model: nn.Module, number: int) -> None:
        for step in range(number):
            model.zero_grad()
            model(inputs).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 1e-3 * parameter.grad
            phase.after_step(model, WORLD, step + 1, 4)

    whole, cut = net(), net()
    phase.enter(whole, WORLD)
    steps(whole, 4)
    phase.enter(cut, WORLD)
    steps(cut, 2)
    again = net()
    phase.enter(again, WORLD)
    again.load_state_dict(cut.state_dict())
    steps(again, 2)
    for model in (whole, again):
        phase.leave(model)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
