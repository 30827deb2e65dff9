"""Compressed weights compared with the dense ones that they represent."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.compress import parametrize
from trainer.compress.codebooks import Codebook, cluster
from trainer.compress.install import fold, install
from trainer.compress.masks import largest
from trainer.compress.parametrize import Compression, Masked, Packed, Shared
from trainer.compress.select import weights


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 6, num_layers=2, batch_first=True)
        self.gru = nn.GRU(6, 6, batch_first=True, bidirectional=True)
        self.out = nn.Linear(12, 6)
        self.decoder = nn.Linear(6, 11)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.encoder(tokens))
        hidden, _ = self.gru(hidden)
        return self.decoder(self.out(hidden))


def mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 5)), torch.randn(4, 9)


def conv() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(2))
    x = torch.randn(2, 3, 7, 7)
    return model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)


def language() -> tuple[nn.Module, Tensor]:
    return TiedLanguageModel(), torch.randint(0, 11, (3, 5))


MODELS = [mlp, conv, language]
Made = Callable[[], tuple[nn.Module, Tensor]]


def half_masks(model: nn.Module) -> dict[str, Tensor]:
    return {n: largest(p[0].value, p[0].value.numel() // 2) for n, p in weights(model).items()}


def compress(model: nn.Module, kind: type[Masked] | type[Packed], masks: dict[str, Tensor]) -> None:
    places = weights(model)
    install(model, {name: kind(places[name][0].value, mask) for name, mask in masks.items()})


def train(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):  # gradient accumulation
            model(x).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            model(x)  # evaluation between steps


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.01),
    "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
}


@pytest.mark.parametrize("made", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_packed_training_is_dense_training_with_masked_gradients(made: Made, name: str) -> None:
    torch.manual_seed(1)
    model, x = made()
    masks = half_masks(model)
    for key, places in weights(model).items():
        places[0].value.data.masked_fill_(~masks[key], 0)
    dense = copy.deepcopy(model)
    for key, places in weights(dense).items():
        places[0].trainable.register_hook(lambda grad, mask=masks[key]: grad * mask)
    train(dense, x, OPTIMIZERS[name](list(dense.parameters())))

    compress(model, Packed, masks)
    trainable = list(model.parameters())
    assert sum(p.numel() for p in trainable if p.ndim == 1) < sum(
        p.numel() for p in dense.parameters()
    )
    train(model, x, OPTIMIZERS[name](trainable))
    inside = model(x)
    fold(model)
    for (key, value), expected in zip(model.named_parameters(), dense.parameters(), strict=True):
        if name.startswith("fused"):  # vectorised remainders may round differently
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7, msg=key)
        else:
            assert torch.equal(value, expected), key
    assert torch.equal(inside, model(x))
    for key, places in weights(model).items():
        assert not places[0].value[~masks[key]].any()


@pytest.mark.parametrize("made", MODELS)
@pytest.mark.parametrize("kind", [Masked, Packed])
def test_fold_restores_names_order_type_format_and_ties(
    made: Made, kind: type[Masked] | type[Packed]
) -> None:
    model, _ = made()
    first = next(iter(weights(model).values()))[0]
    first.value.requires_grad_(False)
    before = {k: (v.shape, v.dtype, v.stride()) for k, v in model.state_dict().items()}
    named = [(name, p.requires_grad) for name, p in model.named_parameters()]
    classes = [type(module) for module in model.modules()]
    masks = half_masks(model)
    expected = {n: p[0].value.detach() * masks[n] for n, p in weights(model).items()}
    compress(model, kind, masks)
    fold(model)
    after = {k: (v.shape, v.dtype, v.stride()) for k, v in model.state_dict().items()}
    assert list(after.items()) == list(before.items())
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == named
    assert [type(module) for module in model.modules()] == classes
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    for name, places in weights(model).items():
        assert torch.equal(places[0].value, expected[name])
        assert all(place.value is places[0].value for place in places)


@pytest.mark.parametrize("made", MODELS)
def test_masked_passes_the_dense_gradient(made: Made) -> None:
    model, x = made()
    masks = half_masks(model)
    dense = copy.deepcopy(model)
    for key, places in weights(dense).items():
        places[0].value.data.masked_fill_(~masks[key], 0)
    compress(model, Masked, masks)
    for each in (model, dense):
        each(x).square().mean().backward()
    for name, places in weights(dense).items():
        trainable = weights(model)[name][0].trainable
        assert trainable.grad is not None
        assert torch.equal(trainable.grad, places[0].value.grad)
        assert trainable.grad[~masks[name]].any()


def test_a_masked_weight_is_plus_zero_even_where_it_was_infinite() -> None:
    weight = torch.tensor([[-1.0, torch.inf, 3.0]])
    masked = Masked(weight, torch.tensor([[False, False, True]]))
    assert masked(weight).tolist() == [[0.0, 0.0, 3.0]]
    assert not masked(weight).signbit().any()


def test_a_weight_may_be_used_twice_and_two_graphs_may_live_at_once() -> None:
    layer = nn.Linear(5, 5)
    compress(layer, Packed, half_masks(layer))
    x = torch.randn(3, 5)
    first, second = layer(layer(x)).sum(), layer(x).sum()
    second.backward()
    layer(x)  # writes the same values while the first graph still needs them
    first.backward()
    assert layer.parametrizations.weight.original.grad.shape == (12,)


@pytest.mark.parametrize("kind", [Masked, Packed])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", [mlp, conv])
def test_mixed_precision_keeps_zeros(
    made: Made, kind: type[Masked] | type[Packed], dtype: torch.dtype
) -> None:
    model, x = made()
    masks = half_masks(model)
    compress(model, kind, masks)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    before = {name: places[0].value.clone() for name, places in weights(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for name, places in weights(model).items():
        value = places[0].value
        assert value.dtype == torch.float32
        assert not value[~masks[name]].any()
        assert (value != before[name])[masks[name]].all()


@pytest.mark.parametrize("kind", [Masked, Packed])
@pytest.mark.parametrize("made", MODELS)
def test_copies_and_state_dicts_are_independent(
    made: Made, kind: type[Masked] | type[Packed]
) -> None:
    model, x = made()
    masks = half_masks(model)
    blank = copy.deepcopy(model)
    compress(model, kind, masks)
    model(x).sum().backward()
    twin = copy.deepcopy(model)
    expected = model(x)
    train(twin, x, torch.optim.SGD(twin.parameters(), 0.1))
    assert torch.equal(model(x), expected)
    assert not torch.equal(twin(x), expected)

    compress(
        blank, kind, {name: ~mask for name, mask in masks.items()} if kind is Masked else masks
    )
    blank.load_state_dict(twin.state_dict())
    assert torch.equal(blank(x), twin(x))
    assert not any("dense" in key or "index" in key for key in twin.state_dict())
    fold(twin)
    assert torch.equal(blank(x), twin(x))
    assert torch.equal(model(x), expected)
    fold(model)
    assert torch.equal(model(x), expected)


def test_memory_format_and_type_may_change_in_between() -> None:
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(1, 3, 5, 5)
    for kind in (Masked, Packed):
        compress(layer, kind, half_masks(layer))
        expected = layer(x)
        layer.to(memory_format=torch.channels_last)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer.double()(x.double()).float(), expected)
        layer.float()
        fold(layer)


def test_weights_that_are_views() -> None:
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.randn(4, 3).t())
    other = nn.Linear(4, 3)
    other.weight = nn.Parameter(torch.randn(3, 8)[:, ::2])
    for module in (layer, other):
        masks = half_masks(module)
        expected = module.weight.detach() * masks["weight"]
        compress(module, Packed, masks)
        assert torch.equal(module.weight, expected)
        module(torch.randn(2, 4)).sum().backward()
        fold(module)
        assert torch.equal(module.weight, expected)


def test_sparse_embedding_gradients() -> None:
    table = nn.Embedding(6, 3, sparse=True)
    compress(table, Packed, half_masks(table))
    table(torch.tensor([1, 1, 4])).sum().backward()
    assert table.parametrizations.weight.original.grad.shape == (9,)


def test_a_weight_without_survivors_trains() -> None:
    model, x = mlp()
    compress(model, Packed, {"0.weight": torch.zeros(8, 9, dtype=torch.bool)})
    train(model, x, torch.optim.Adam(model.parameters(), fused=True))
    fold(model)
    assert not model[0].weight.any()


def test_an_exception_in_a_recurrent_net_leaves_nothing_stale() -> None:
    lstm = nn.LSTM(3, 4)
    compress(lstm, Packed, half_masks(lstm))
    with pytest.raises(RuntimeError, match="input"):
        lstm(torch.randn(2, 1, 5))
    x = torch.randn(2, 1, 3)
    before, _ = lstm(x)
    with torch.no_grad():
        for parameter in lstm.parameters():
            parameter.data.add_(1)
    assert not torch.equal(lstm(x)[0], before)


def test_each_forward_of_a_recurrent_net_writes_each_weight_once() -> None:
    class Counting(Packed):
        writes = 0

        def write(self, trainable: Tensor) -> None:
            Counting.writes += 1
            super().write(trainable)

    lstm = nn.LSTM(3, 4)
    compress(lstm, Counting, half_masks(lstm))
    lstm(torch.randn(2, 1, 3))
    assert Counting.writes == 2


def test_install_refuses() -> None:
    layer = nn.Linear(3, 3)
    masked = Masked(layer.weight, torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="no weight is named 'fc'; there are weight"):
        install(layer, {"fc": masked})
    install(layer, {"weight": masked})
    with pytest.raises(ValueError, match="compressed already"):
        install(layer, {"weight": masked})


def test_compressions_stack_with_other_parametrizations() -> None:
    class Rounded(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + (weight.round(decimals=1) - weight).detach()

    layer = nn.Linear(6, 4)
    compress(layer, Packed, half_masks(layer))
    nn.utils.parametrize.register_parametrization(layer, "weight", Rounded())
    packed = layer.parametrizations.weight[0]
    assert isinstance(packed, Compression)
    F.linear(torch.ones(1, 6), layer.weight).sum().backward()
    assert layer.parametrizations.weight.original.grad.tolist() == [1.0] * 12
    expected = layer.weight.detach().clone()
    fold(layer)
    assert torch.equal(layer.weight, expected)
    assert int(layer.weight.count_nonzero()) <= 12


# --- shared ---


def share(model: nn.Module, density: float = 0.5, k: int = 5) -> dict[str, Codebook]:
    """Prune, cluster and install; the codebooks by name."""
    found, books = weights(model), {}
    for name, places in found.items():
        weight = places[0].value.data
        weight.masked_fill_(~largest(weight, int(density * weight.numel())), 0)
        books[name] = cluster(weight, k)
    install(model, {name: Shared(found[name][0].value, book) for name, book in books.items()})
    return books


def expected_value(book: Codebook, values: Tensor) -> Tensor:
    return torch.cat((values.new_zeros(1), values))[book.codes.long()]


@pytest.mark.parametrize("made", MODELS)
def test_the_gradient_of_a_shared_value_is_the_sum_over_its_cluster(made: Made) -> None:
    torch.manual_seed(1)
    model, x = made()
    dense = copy.deepcopy(model)
    books = share(model)
    for name, places in weights(dense).items():
        places[0].value.data.copy_(expected_value(books[name], books[name].values))
    for each in (model, dense):
        each(x).square().mean().backward()
    for name, places in weights(dense).items():
        grad, trainable = places[0].value.grad, weights(model)[name][0].trainable
        assert trainable.shape == books[name].values.shape
        for i in range(len(trainable)):
            wanted = grad[books[name].codes == i + 1].sum()
            torch.testing.assert_close(trainable.grad[i], wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("made", MODELS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_shared_training_moves_clusters_and_no_zero(made: Made, name: str) -> None:
    torch.manual_seed(1)
    model, x = made()
    books = share(model)
    before = {key: places[0].trainable.detach().clone() for key, places in weights(model).items()}
    train(model, x, OPTIMIZERS[name](list(model.parameters())))
    after = {key: places[0].trainable.detach().clone() for key, places in weights(model).items()}
    inside = model(x)
    fold(model)
    assert torch.equal(inside, model(x))
    for key, places in weights(model).items():
        assert not torch.equal(before[key], after[key])
        value = places[0].value
        assert torch.equal(value, expected_value(books[key], after[key]))
        assert torch.equal(value == 0, books[key].codes == 0)
        assert not value[books[key].codes == 0].signbit().any()


@pytest.mark.parametrize("made", MODELS)
def test_sharing_and_folding_keep_bits_names_formats_and_ties(made: Made) -> None:
    model, x = made()
    before = {k: (v.shape, v.dtype, v.stride()) for k, v in model.state_dict().items()}
    books = share(model)
    assert not any("index" in key or "sizes" in key for key in model.state_dict())
    inside = model(x)
    fold(model)
    after = {k: (v.shape, v.dtype, v.stride()) for k, v in model.state_dict().items()}
    assert list(after.items()) == list(before.items())
    assert torch.equal(inside, model(x))
    for name, places in weights(model).items():
        assert torch.equal(places[0].value, expected_value(books[name], books[name].values))
        assert all(place.value is places[0].value for place in places)


def test_a_shared_checkpoint_is_the_codebook() -> None:
    model, x = mlp()
    start = copy.deepcopy(model)
    books = share(model)
    share(start)
    train(model, x, torch.optim.SGD(model.parameters(), 0.1))
    state = model.state_dict()
    assert state["0.parametrizations.weight.original"].shape == books["0.weight"].values.shape
    start.load_state_dict(state)
    assert torch.equal(start(x), model(x))


def test_a_weight_of_zeros_can_be_shared_and_trained() -> None:
    layer = nn.Linear(4, 3)
    layer.weight.data.zero_()
    install(layer, {"weight": Shared(layer.weight, cluster(layer.weight, 4))})
    layer(torch.randn(2, 4)).sum().backward()
    assert layer.parametrizations.weight.original.grad.shape == (0,)
    fold(layer)
    assert not layer.weight.any()


def test_sums_over_large_clusters_are_exact_to_the_last_bits() -> None:
    torch.manual_seed(0)
    weight, grad = torch.randint(-1, 2, (500, 800)).float(), torch.rand(500, 800)
    summed = Shared(weight, cluster(weight, 2)).gradient(grad)
    wanted = torch.stack([grad[weight == value].double().sum() for value in (-1, 1)])
    torch.testing.assert_close(summed.double(), wanted, rtol=1e-7, atol=0)  # about 133,000 each


def test_sums_on_cuda_are_those_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    for weight in (torch.randn(30, 40), torch.randn(8, 5).t(), torch.zeros(4, 4)):
        weight = weight * (torch.rand_like(weight) < 0.5)
        book, grad = cluster(weight, 7), torch.randn_like(weight)
        made = Shared(weight, book)
        with monkeypatch.context() as patch:
            patch.setattr(parametrize, "_prefers_segments", lambda weight: True)
            on_cuda = Shared(weight, book)
        assert torch.equal(on_cuda.gradient(grad), made.gradient(grad))
        assert torch.equal(on_cuda(book.values), made(book.values))


class Writes(TorchDispatchMode):
    """Records for each index_copy_ whether CUDA would sort its indices."""

    def __init__(self) -> None:
        super().__init__()
        self.sorts: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index_copy_.default:
            self.sorts.append(torch.are_deterministic_algorithms_enabled())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["default", "warn", "error"])
def test_writes_need_no_sorting_in_deterministic_mode(mode: str) -> None:
    weight = torch.randn(6, 5)
    book, mask = cluster(weight, 3), weight > 0
    before = torch.get_deterministic_debug_mode()
    try:
        torch.set_deterministic_debug_mode(mode)
        chosen = torch.get_deterministic_debug_mode()
        with Writes() as writes:
            Shared(weight, book)(book.values)
            Packed(weight, mask)(weight[mask])
            with pytest.raises(IndexError):
                Packed(weight, mask)(weight[mask][1:])
        assert writes.sorts[:2] == [False, False]
        assert torch.get_deterministic_debug_mode() == chosen
    finally:
        torch.set_deterministic_debug_mode(before)
