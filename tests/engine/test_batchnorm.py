"""Batch norm over all ranks, compared with one process that has all the samples."""

import copy

import pytest
import torch
from torch import nn

from tests.engine import bodies
from trainer.config import FitConfig
from trainer.data.order import shard
from trainer.data.split import TensorSplit
from trainer.engine.batchnorm import SyncBatchNorm
from trainer.engine.loop import fit, micro_batches
from trainer.engine.world import World

ALONE = World.single(torch.device("cpu"))


class Residual(nn.Module):
    """Batch norms of several kinds, in branches, one of them computed by a subclass."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), WithActivation(4, momentum=None)
        self.fc, self.bn3 = nn.Linear(4 * 9, 5), nn.BatchNorm1d(5, affine=False)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        x = x + self.bn2(self.conv2(x))
        return self.out(torch.tanh(self.bn3(self.fc(x.flatten(1)))))


class WithActivation(nn.BatchNorm2d):
    """As in timm: a subclass with a forward of its own."""

    def forward(self, x):
        return torch.relu(super().forward(x))


def problem(samples=45):
    generator = torch.Generator().manual_seed(1)
    inputs = 3 + 2 * torch.randn(samples, 1, 3, 3, generator=generator)
    targets = (inputs[:, 0, 0, 0] > 3).long() + (inputs[:, 0, 1, 1] > 4).long()
    with bodies.BUILDING:
        torch.manual_seed(2)
        return TensorSplit(inputs, targets), Residual()


def train(world, sync, *, batch_size=16, accumulate=1, precision="fp32", **allreduce):
    split, model = problem()
    run = bodies.runtime(world, batch_size, precision, sync_batchnorm=sync, **allreduce)
    losses = []
    for step in fit(model, split, FitConfig(epochs=1, accumulate=accumulate), run):
        losses.append(step.loss)
    return losses, model.state_dict()


CASES = [
    {},
    {"accumulate": 2},
    {"batch_size": 43},  # the last batch has two samples: one of three ranks has none
    {"batch_size": 9, "accumulate": 4},  # some ranks have no sample in some micro-batches
    {"algorithm": "native", "bucket_mb": 1e-4},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.slow
def test_ranks_train_like_one(ranks, size, settings):
    losses, weights = train(ALONE, sync=True, **settings)
    results = ranks(size, lambda world: train(world, sync=True, **settings))
    for other_losses, other in results:
        assert other_losses == pytest.approx(losses, rel=2e-5)
        for name, value in weights.items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-4)
            assert torch.equal(other[name], results[0][1][name])


def test_without_it_they_do_not(ranks):
    losses, _ = train(ALONE, sync=False)
    (other_losses, _), _ = ranks(2, lambda world: train(world, sync=False))
    assert other_losses != pytest.approx(losses, rel=1e-2)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(ranks, precision):
    losses, _ = train(ALONE, sync=True, precision=precision)
    (other_losses, _), _ = ranks(2, lambda world: train(world, sync=True, precision=precision))
    assert other_losses == pytest.approx(losses, rel=0.03)


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("shape", [(7, 3), (7, 3, 5), (7, 3, 4, 5)])
def test_outputs_gradients_and_statistics_are_those_of_all_samples(ranks, shape, offset):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + offset
    upstream = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    norm = kind(3, dtype=torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, -2.0]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, 0.3]))
    reference, x_reference = copy.deepcopy(norm), x.clone().requires_grad_()
    expected = reference(x_reference)
    (expected * upstream).sum().backward()

    def body(world):
        part = shard(torch.arange(7), world.rank, world.size)
        mine = copy.deepcopy(norm)
        sync = SyncBatchNorm(world)
        # The last rank has no sample: it takes part with a substitute, which must not count.
        sync.counts = world.rank < world.size - 1
        part = shard(torch.arange(7), world.rank, world.size - 1) if sync.counts else part[:1]
        inputs = x[part].clone().requires_grad_()
        with sync:
            outputs = mine(inputs)
        (outputs * (upstream[part] if sync.counts else torch.zeros(()))).sum().backward()
        if not sync.counts:
            assert inputs.grad.eq(0).all()
            assert mine.weight.grad.eq(0).all()
        else:
            torch.testing.assert_close(outputs, expected[part], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(inputs.grad, x_reference.grad[part], rtol=1e-9, atol=1e-8)
        for name, value in reference.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[name], value, rtol=1e-9, atol=1e-9)
        return mine.weight.grad, mine.bias.grad

    results = ranks(3, body)
    torch.testing.assert_close(
        sum(w for w, _ in results), reference.weight.grad, rtol=1e-9, atol=1e-8
    )
    torch.testing.assert_close(
        sum(b for _, b in results), reference.bias.grad, rtol=1e-9, atol=1e-8
    )


def test_evaluation_is_left_alone(ranks):
    """The ranks need not call it alike: it waits for nobody."""

    def body(world):
        norm = nn.BatchNorm1d(3).eval()
        sync = SyncBatchNorm(world)
        if world.rank == 0:
            with sync:
                assert torch.equal(norm(torch.ones(2, 3)), norm(torch.ones(2, 3)))

    ranks(2, body, timeout_s=5.0)


def test_micro_batches_of_all_ranks_are_those_of_one():
    batch = torch.arange(9)
    alone = micro_batches(batch, 0, 1, 4, together=True)
    shares = [micro_batches(batch, rank, 3, 4, together=True) for rank in range(3)]
    assert [len(share) for share in shares] == [4, 4, 4]
    for number, whole in enumerate(alone):
        assert torch.equal(torch.cat([share[number] for share in shares]), whole)
    assert any(not len(micro) for share in shares for micro in share)
