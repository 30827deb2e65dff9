"""Models and batches are moved to the device and the memory format of a run."""

import pytest
import torch
from torch import nn

from tests.engine.bodies import BUILDING, runtime
from trainer.config import FitConfig
from trainer.data.split import TensorSplit
from trainer.engine.evaluate import evaluate
from trainer.engine.loop import fit
from trainer.engine.world import World

WORLD = World.single(torch.device("cpu"))


class Volumes(nn.Module):
    """Parameters of five, four, two and one dimensions."""

    def __init__(self):
        super().__init__()
        self.conv3, self.conv2 = nn.Conv3d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.out = nn.Linear(4 * 9, 3)
        self.register_buffer("scale", torch.ones(1, 4, 2, 5, 5))
        self.register_buffer("codes", torch.zeros(2, 3, 4, 5, dtype=torch.int64))

    def forward(self, x):
        x = (self.conv3(x) * self.scale).mean(2)
        return self.out(torch.relu(self.conv2(x)).flatten(1))


def problem():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(20, 2, 4, 7, 7, generator=generator)
    return TensorSplit(inputs, (inputs.mean((1, 2, 3, 4)) > 0).long())


def test_parameters_and_inputs_of_five_dimensions_may_be_channels_last():
    results = []
    for channels_last in (False, True):
        torch.manual_seed(0)
        run = runtime(WORLD, channels_last=channels_last)
        model = run.place(Volumes())
        assert (
            model.conv3.weight.is_contiguous(memory_format=torch.channels_last_3d) is channels_last
        )
        assert model.conv2.weight.is_contiguous(memory_format=torch.channels_last) is channels_last
        assert model.scale.is_contiguous(memory_format=torch.channels_last_3d) is channels_last
        split = problem()
        inputs, _ = run.place_batch(split.inputs, split.targets)
        assert inputs.is_contiguous(memory_format=torch.channels_last_3d) is channels_last
        losses = [step.loss for step in fit(model, split, FitConfig(epochs=2), run)]
        results.append([*losses, evaluate(model, split, run).loss])
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "Adagrad"])
@pytest.mark.parametrize("size", [1, 2])
def test_sparse_embeddings_train_like_dense_ones(ranks, size, optimizer):
    """Fused kernels, clipping and averaging take dense gradients only."""

    def train(world, sparse):
        with BUILDING:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(9, (20, 3), generator=generator)
        split = TensorSplit(tokens, tokens.sum(1) % 3)
        settings = {"_target_": f"torch.optim.{optimizer}", "lr": 0.1}
        run = runtime(world, optimizer=settings)
        list(fit(model, split, FitConfig(epochs=2, clip=1.0, accumulate=2), run))
        return model.state_dict()

    for sparse, dense in ranks(size, lambda world: (train(world, True), train(world, False))):
        for name, value in dense.items():
            torch.testing.assert_close(sparse[name], value)
