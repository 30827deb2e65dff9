"""Data and model that do not fit are refused before the first step, and nothing is changed."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from tests.engine.bodies import runtime
from trainer.config import FitConfig
from trainer.data.split import Splits, TensorSplit
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.models import LSTMLanguageModel
from trainer.worker.preflight import check_compatible

WORLD = World.single(torch.device("cpu"))


def splits(inputs, targets, **others):
    good = TensorSplit(inputs, targets)
    return Splits(**{"train": good, "validation": good, "test": good, **others})


IMAGES = splits(torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 1, 0]))


def net(classes=3, features=64):
    return nn.Sequential(
        nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(features, classes)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_what_fits_passes_and_nothing_changes(precision):
    model = net().train()
    state, chance = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    target = check_compatible(model, IMAGES, runtime(WORLD, precision=precision))
    assert target == ()  # one class
    assert model.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(chance, torch.get_rng_state())


def test_language_models_fit_by_their_vocabulary():
    ids = torch.randint(0, 12, (4, 7), generator=torch.Generator().manual_seed(0))
    ids[3, 6] = 11
    data = splits(ids, ids)
    assert check_compatible(LSTMLanguageModel(12, 4, 4), data, runtime(WORLD)) == (7,)
    with pytest.raises(ConfigError, match="label 11, but LSTMLanguageModel has 11 outputs"):
        check_compatible(LSTMLanguageModel(11, 4, 4), data, runtime(WORLD))


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (net(features=63), IMAGES, r"Sequential cannot take a train sample \(float32 \[1, 8, 8\]"),
        (net(classes=2), IMAGES, "train holds the label 2.*2 outputs, for labels 0 to 1"),
        (nn.Flatten(0), IMAGES, r"for targets \[1\] of train Flatten gives \[64\]"),
        (
            net(),
            splits(
                IMAGES.train.inputs,
                IMAGES.train.targets,
                test=TensorSplit(IMAGES.train.inputs, torch.tensor([0, 0, -1, 0, 0])),
            ),
            "test holds the label -1",
        ),
        (
            net(),
            splits(
                IMAGES.train.inputs,
                IMAGES.train.targets,
                validation=TensorSplit(torch.randn(2, 3, 8, 8), torch.tensor([0, 0])),
            ),
            r"validation sample \(float32 \[3, 8, 8\]",
        ),
    ],
    ids=["shape", "label", "logits", "test-label", "validation-shape"],
)  # fmt: skip
def test_what_does_not_fit_is_a_wrong_configuration(model, data, said):
    with pytest.raises(ConfigError, match=said):
        check_compatible(model, data, runtime(WORLD))
    assert model.training


def test_classes_that_are_no_int64_are_refused():
    data = splits(IMAGES.train.inputs, IMAGES.train.targets.int())
    with pytest.raises(ConfigError, match=r"targets of train are int32; they must be .* int64"):
        check_compatible(net(), data, runtime(WORLD))


def test_a_last_piece_that_is_too_small_for_batch_norm_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    state = copy.deepcopy(model.state_dict())

    def check(batch_size, **fit):
        check_compatible(model, IMAGES, runtime(WORLD, batch_size=batch_size), [FitConfig(**fit)])

    check(5, epochs=1)
    check(5, epochs=1, accumulate=2)  # pieces of three and two
    check(4, epochs=0)  # nothing is trained
    check(4, epochs=2, max_steps=1)  # the last batch is not reached
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    for batch_size, accumulate in ((4, 1), (5, 3)):
        said = (
            rf"data\.batch_size={batch_size} with cluster\.workers=1 and fit\.accumulate="
            rf"{accumulate}: Sequential cannot be trained on as little as 1 of the 5 .* samples"
        )
        with pytest.raises(ConfigError, match=said):
            check(batch_size, epochs=1, accumulate=accumulate)


def test_every_rank_refuses_what_one_of_them_would_meet():
    """Of a batch of three the first of two ranks has two samples."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    for rank in (0, 1):
        world = World(rank, 2, WORLD.device, WORLD.transport, None)
        with pytest.raises(ConfigError, match="as little as 1 of the 5"):
            check_compatible(model, IMAGES, runtime(world, batch_size=3), [FitConfig(epochs=1)])


def test_synchronized_batch_norm_needs_few_samples_on_all_ranks_together():
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3))
    world = World(1, 2, WORLD.device, WORLD.transport, None)
    for batch_size, refused in ((3, False), (4, True)):
        run = runtime(world, batch_size=batch_size, sync_batchnorm=True)
        with pytest.raises(ConfigError, match="as little as 1") if refused else nullcontext():
            check_compatible(model, IMAGES, run, [FitConfig(epochs=1)])


class Auxiliary(nn.Linear):
    """A second head while training, as GoogLeNet has."""

    def forward(self, x):
        logits = super().forward(x.flatten(1))
        return (logits, logits) if self.training else logits


def test_other_outputs_in_training_are_refused():
    with pytest.raises(ConfigError, match="Auxiliary gives tuple in training mode"):
        check_compatible(Auxiliary(64, 3), IMAGES, runtime(WORLD), [FitConfig(epochs=1)])
    check_compatible(Auxiliary(64, 3), IMAGES, runtime(WORLD), [FitConfig(epochs=0)])
