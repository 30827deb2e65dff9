"""Other ways to execute a model: compiled, or with activations that are computed twice."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.engine import bodies
from tests.worker.test_selection import ALONE, of
from trainer.compress.install import install
from trainer.compress.parametrize import Packed
from trainer.config import FitConfig
from trainer.data.split import Splits, TensorSplit
from trainer.engine import recompute
from trainer.engine.compiled import check_compiler, compiled
from trainer.engine.heartbeat import Heartbeat
from trainer.engine.recompute import recomputed
from trainer.errors import ConfigError
from trainer.experiment import Experiment, check_phases
from trainer.messages import PhaseEnded
from trainer.phases import Prune, Quantize, Share, Train
from trainer.store.serialization import from_bytes
from trainer.worker.run import Start, run_phases


class Net(nn.Module):
    """All kinds of layers that need care."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2))
        self.rnn = nn.LSTM(16, 5, batch_first=True)
        self.head = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, images):
        rows = self.conv(images).flatten(2)
        return self.head(self.rnn(rows)[0][:, -1])


def weights_after(phases, model=Net, **options):
    generator = torch.Generator().manual_seed(1)
    split = TensorSplit(
        torch.randn(16, 1, 6, 6, generator=generator),
        torch.randint(3, (16,), generator=generator),
    )
    cfg = Experiment(
        model=model,
        data=Splits(split, split, split),
        phases=phases,
        batch_size=8,
        lr=0.1,
        cluster={"backend": "inline", "workers": 1},
        **options,
    )
    found = of(PhaseEnded, run_phases(ALONE, cfg, Start(0)))
    return [from_bytes(message.weights)[0] for message in found]


def fit(**settings):
    return FitConfig(epochs=1, max_steps=2, **settings)


CHAIN = [
    Prune(0.5, schedule="cubic", interval=1, fit=fit()),
    Share(bits=3, fit=fit(lr=0.01)),
]


def test_recomputed_activations_change_no_bit(monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return checkpoint(*args, **kwargs)

    monkeypatch.setattr(recompute, "checkpoint", counted)
    plain = weights_after(CHAIN)
    assert calls == []
    again = weights_after(CHAIN, recompute=["conv", "rnn", "head.*"])
    assert calls
    for one, other in zip(plain, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_modules_are_computed_twice_and_only_then():
    model = Net()
    calls = []
    model.conv[0].register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    inputs = torch.randn(2, 1, 6, 6)
    with recomputed(model, ["conv", "conv.0"]):
        model(inputs).sum().backward()
        copied = copy.deepcopy(model)
        with torch.no_grad():
            model(inputs)
    assert calls == [True, True, False]
    assert model.conv[1].num_batches_tracked == 2
    model(inputs).sum().backward()
    copied(inputs).sum().backward()
    assert len(calls) == 5


def layers():
    norm, head = nn.BatchNorm2d(4), nn.Linear(64, 3)
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), head)


def test_compression_works_compiled(monkeypatch):
    made = []

    def counted(function, **options):
        made.append(function.__name__)
        return real(function, **options)

    real = torch.compile
    monkeypatch.setattr(torch, "compile", counted)
    keep = ["zeros", "sharing"]
    quantize = Quantize(keep=keep, per_channel=False, fold=False, fit=fit(lr=0.01))
    phases = [*CHAIN, quantize]
    plain = weights_after(phases, layers)
    assert made == []
    found = weights_after(phases, layers, compile={"backend": "eager"})
    assert made.count("plain") == len(phases)
    for one, other in zip(plain, found, strict=True):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value)
            assert torch.equal(other[name] == 0, value == 0)


def test_packed_weights_are_compiled_in_one_graph():
    model = nn.utils.parametrizations.weight_norm(nn.Linear(64, 64))  # of the user's own
    model = nn.Sequential(*layers()[:4], model, layers()[4])
    model[5].weight.data[:, ::2] = 0
    install(model, {"5.weight": Packed(model[5].weight, model[5].weight != 0)})
    graphs = []

    def backend(graph, examples):
        graphs.append(graph)
        return graph

    inputs = torch.randn(2, 1, 6, 6)
    expected = model(inputs)
    with compiled(model, {"backend": backend, "fullgraph": True}, Heartbeat()):
        found = model(inputs)
    found.sum().backward()
    assert len(graphs) == 1
    torch.testing.assert_close(found, expected)
    assert model[5].parametrizations.weight.original.grad.shape == (96,)
    assert model(inputs).shape == (2, 3)
    assert len(graphs) == 1


def test_wrong_settings_are_refused():
    split, model = bodies.problem()
    for options, said in [
        ({"compile": "yes"}, "compile=yes: it must be true, false, or a mapping"),
        ({"compile": {"back": 1}}, "compile: a setting=back: it must be one of backend, mode"),
        ({"compile": True, "sync_batchnorm": True}, "compile=True with sync_batchnorm=True"),
        ({"compile": True, "recompute": ["0"]}, r"compile=True with recompute=\['0'\]"),
        ({"sync_batchnorm": True, "recompute": ["0"]}, r"recompute=\['0'\] with sync_batchnorm"),
    ]:
        with pytest.raises(ConfigError, match=said):
            Experiment(model=model, data=Splits(split, split, split), phases=[Train()], **options)
    cfg = Experiment(
        model=model, data=Splits(split, split, split), phases=[Train()], recompute=["layer*"]
    )
    with pytest.raises(
        ConfigError, match=r"recompute: 'layer\*' matches no module; there are 0, 1"
    ):
        check_phases(cfg, model)
    with pytest.raises(ConfigError, match=r"compile=\{'backend': 'icc'\}: torch.compile fails on"):
        check_compiler({"backend": "icc"}, torch.device("cpu"))
