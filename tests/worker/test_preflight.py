"""Data and model that do not fit are refused before the first step, and nothing is changed."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from tests.engine.bodies import runtime
from trainer.config import FitConfig
from trainer.data.checked import CheckedSplit
from trainer.data.datasets import DatasetSplit
from trainer.data.split import Splits, TensorSplit
from trainer.engine.world import World
from trainer.errors import ConfigError, RunError
from trainer.models import LSTMLanguageModel
from trainer.tasks import Average, Custom
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
    checked, target = check_compatible(model, IMAGES, runtime(WORLD, precision=precision))
    assert target == ()  # one class
    assert isinstance(checked.train, CheckedSplit)
    assert (checked.train.split, checked.train.name) == (IMAGES.train, "train")
    assert model.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(chance, torch.get_rng_state())


def test_language_models_fit_by_their_vocabulary():
    ids = torch.randint(0, 12, (4, 7), generator=torch.Generator().manual_seed(0))
    ids[3, 6] = 11
    data = splits(ids, ids)
    ids[2, 3:] = -100  # ignored
    _, target = check_compatible(LSTMLanguageModel(12, 4, 4), data, runtime(WORLD))
    assert target == (7,)
    with pytest.raises(ConfigError, match=r"train sample 3: its target is 11, .* has 11 outputs"):
        check_compatible(LSTMLanguageModel(11, 4, 4), data, runtime(WORLD))


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (net(features=63), IMAGES, r"Sequential cannot take a train sample \(float32 \[1, 8, 8\]"),
        (net(classes=2), IMAGES, r"train sample 2: its target is 2, .*2 outputs, for .* 0 to 1"),
        (nn.Flatten(0), IMAGES, r"for targets \[1\] of train Flatten returns \[64\]"),
        (
            net(),
            splits(IMAGES.train.inputs.double(), IMAGES.train.targets),
            r"sample \(float64 \[1, 8, 8\]\); convert inputs to float32: RuntimeError",
        ),
        (
            net().half(),
            IMAGES,
            r"sample \(float32 \[1, 8, 8\]\); convert the model with \.float\(\), since",
        ),
        (
            net(),
            splits(IMAGES.train.inputs, nn.functional.one_hot(IMAGES.train.targets, 3)),
            r"one-hot targets become classes by targets\.argmax\(-1\)",
        ),
        (
            net(),
            splits(IMAGES.train.inputs, IMAGES.train.targets[:, None]),
            r"become \[n\] by targets\.squeeze\(1\)",
        ),
        (
            net(),
            splits(
                IMAGES.train.inputs,
                IMAGES.train.targets,
                test=TensorSplit(IMAGES.train.inputs, torch.tensor([0, 0, -1, 0, 0])),
            ),
            "test sample 2: its target is -1",
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
    ids=[
        *("shape", "label", "logits", "float64", "half", "one-hot", "column"),
        *("test-label", "validation-shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_wrong_configuration(model, data, said):
    with pytest.raises(ConfigError, match=said):
        check_compatible(model, data, runtime(WORLD))
    assert model.training


def test_a_loss_that_broadcasts_the_targets_is_refused():
    data = splits(IMAGES.train.inputs, torch.randn(5))
    for loss in (nn.MSELoss(), nn.MSELoss(reduction="none"), nn.L1Loss()):
        with pytest.raises(
            ConfigError, match=r"task.loss: .* Using a target size .* such as targets\[:, None\]"
        ):
            check_compatible(net(classes=1), data, runtime(WORLD, task=Custom(loss)))
    flat, column = (
        nn.Sequential(net(classes=1), nn.Flatten(0)),
        splits(IMAGES.train.inputs, torch.randn(5, 1)),
    )
    with pytest.raises(ConfigError, match=r"task.loss: .* Using a target size"):
        check_compatible(flat, column, runtime(WORLD, task=Custom(nn.MSELoss())))
    task = Custom(lambda found, wanted: (found.flatten() - wanted).square().mean())
    task.measured["mae"] = Average(nn.functional.l1_loss)
    with pytest.raises(ConfigError, match=r"task.metrics.mae: .* Using a target size"):
        check_compatible(net(classes=1), data, runtime(WORLD, task=task))


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_broadcast_that_is_right_is_allowed():
    masks = splits(torch.randn(4, 3, 5, 5), torch.randn(4, 1, 5, 5))
    check_compatible(nn.Conv2d(3, 3, 1), masks, runtime(WORLD, task=Custom(nn.MSELoss())))


def test_a_mean_of_dimension_one_is_refused():
    data = splits(IMAGES.train.inputs, torch.randn(5, 3))

    def mean(found, wanted):
        return nn.functional.mse_loss(found, wanted).reshape(1)

    with pytest.raises(
        ConfigError, match=r"task.loss: .* the loss returned \[1\] for targets \[2, 3"
    ):
        check_compatible(net(), data, runtime(WORLD, task=Custom(mean)))
    task = Custom(nn.MSELoss(), metrics={"mean": Average(mean)})
    with pytest.raises(ConfigError, match=r"task.metrics.mean: .* returned \[1\] for 2 targets"):
        check_compatible(net(), data, runtime(WORLD, task=task))


def test_a_loss_of_several_outputs_is_the_models():
    twice = nn.ModuleList([net()])
    twice.forward = lambda images: (twice[0](images), twice[0](-images))
    task = Custom(lambda both, targets: (both[0] - both[1]).square().mean())
    with pytest.raises(ConfigError, match=r"with \[1, 3\] of the output alone: .*task.loss=model"):
        check_compatible(twice, IMAGES, runtime(WORLD, task=task))


def test_classes_that_are_not_int64_are_refused():
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
    """Another output while training."""

    def forward(self, x):
        logits = super().forward(x.flatten(1))
        return {"features": logits} if self.training else logits


def test_other_outputs_in_training_are_refused():
    with pytest.raises(ConfigError, match=r"Auxiliary returns in training mode, dict \(features\)"):
        check_compatible(Auxiliary(64, 3), IMAGES, runtime(WORLD), [FitConfig(epochs=1)])
    check_compatible(Auxiliary(64, 3), IMAGES, runtime(WORLD), [FitConfig(epochs=0)])


class Growing(nn.Module):
    """Its buffer grows with each call."""

    def __init__(self, persistent):
        super().__init__()
        self.layer = net()
        self.register_buffer("seen", torch.zeros(1), persistent=persistent)

    def forward(self, images):
        self.seen = torch.cat([self.seen, images.mean().reshape(1)])
        return self.layer(images)


def test_a_buffer_of_the_state_keeps_its_shape():
    with pytest.raises(ConfigError, match=r"buffer seen changes in forward from \[1\] to \[2\], "):
        check_compatible(Growing(persistent=True), IMAGES, runtime(WORLD))
    model = Growing(persistent=False)
    check_compatible(model, IMAGES, runtime(WORLD), [FitConfig(epochs=1)])
    assert model.seen.tolist() == [0]  # as it was


class Detached(nn.Sequential):
    def forward(self, images):
        return super().forward(images).detach()


def test_a_loss_without_gradients_is_refused():
    with pytest.raises(ConfigError, match=r"Detached .* does not depend on any parameter"):
        check_compatible(Detached(net()), IMAGES, runtime(WORLD), [FitConfig(epochs=1)])
    check_compatible(Detached(net()), IMAGES, runtime(WORLD), [FitConfig(epochs=0)])


def test_complex_parameters_are_not_trained():
    model = net()
    model.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ConfigError, match="model: phase is complex, and parameters that are train"):
        check_compatible(model, IMAGES, runtime(WORLD), [FitConfig(epochs=1)])
    model.phase.requires_grad_(False)
    check_compatible(model, IMAGES, runtime(WORLD), [FitConfig(epochs=1)])


class Images(Dataset):
    """Images like IMAGES; some have another label, or cannot be read."""

    def __init__(self, samples=100, labels=None, broken=None):
        self.samples, self.labels, self.broken = samples, labels or {}, broken
        self.read = []

    def __len__(self):
        return self.samples

    def __getitem__(self, index):
        self.read.append(index)
        if index == self.broken:
            raise KeyError("no such image")
        return torch.randn(1, 8, 8), self.labels.get(index, index % 3)


def check_images(train, rank=0, size=1):
    world = World(rank, size, WORLD.device, WORLD.transport, None)
    data = Splits(DatasetSplit(train, seed=0), IMAGES.validation, IMAGES.test)
    return check_compatible(net(), data, runtime(world))


def test_a_target_in_the_middle_of_a_data_set_is_found_beforehand():
    train = Images(labels={57: 10})
    with pytest.raises(ConfigError, match=r"data: train sample 57: its target is 10, .* 3 outputs"):
        check_images(train)


def test_the_ranks_share_the_search():
    read = []
    for rank in range(2):
        check_images(train := Images(), rank, size=2)
        read.append(set(train.read) - {0})
    assert read[0] | read[1] == set(range(1, 100))
    assert not read[0] & read[1]


def test_the_search_takes_no_longer_than_allowed(monkeypatch):
    monkeypatch.setattr("trainer.worker.preflight.SCAN_SECONDS", 0.0)
    data, _ = check_images(train := Images(labels={57: 10}))
    assert len(train.read) < 40
    with pytest.raises(RunError, match="train sample 57: its target is 10"):
        list(data.train.batches(torch.arange(100).split(16), 0))


def test_listed_targets_say_where_to_look_first(monkeypatch):
    monkeypatch.setattr("trainer.worker.preflight.SCAN_SECONDS", 0.0)
    train = Images(labels={57: 10})
    train.targets = [10 if index == 57 else 0 for index in range(100)]
    with pytest.raises(ConfigError, match="train sample 57: its target is 10"):
        check_images(train)
    train.labels = {}  # as a transform would do: what counts is the target that is read
    check_images(train)


@pytest.mark.parametrize("broken", [0, 20])
def test_a_sample_that_cannot_be_read_ends_the_run_at_once(broken):
    with pytest.raises(
        RunError, match=rf"the train data cannot be read: KeyError: .*while sample {broken} was"
    ):
        check_images(Images(broken=broken))


def test_images_that_are_not_tensors_are_a_wrong_configuration():
    pairs = [("image.png", 0)]
    with pytest.raises(ConfigError, match="data: train sample 0: its input must be a tensor"):
        check_images(pairs)


def test_a_split_whose_targets_are_all_ignored_is_refused():
    data = splits(
        IMAGES.train.inputs,
        IMAGES.train.targets,
        validation=TensorSplit(IMAGES.train.inputs, torch.full((5,), -100)),
    )
    with pytest.raises(ConfigError, match="every target of validation is -100"):
        check_compatible(net(), data, runtime(WORLD))


def test_what_cannot_be_trained_is_refused_if_it_is_to_be_trained():
    frozen = net().requires_grad_(False)
    half = nn.Sequential(nn.Flatten(), nn.Linear(64, 3).half())
    for model, precision, problem in (
        (frozen, "fp32", "nothing to train, because no parameter of Sequential"),
        (half, "fp16", "precision=fp16: parameters of Sequential are float16"),
    ):
        run = runtime(WORLD, precision=precision)
        check_compatible(model, IMAGES, run, [FitConfig(epochs=0)])
        with pytest.raises(ConfigError, match=problem):
            check_compatible(model, IMAGES, run, [FitConfig(epochs=1)])


class TwoInputs(nn.Module):
    def forward(self, left, right):
        return left + right


class Wrong(nn.Module):
    def forward(self, x):
        return x.view(7, 7)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TwoInputs(), "cannot take a train sample .*: TypeError: .* argument: 'right'"),
        (Wrong(), r"RuntimeError: shape .* is invalid .* \(test_preflight.py, line \d+\)"),
    ],
)
def test_an_error_of_the_model_names_its_line(model, reason):
    with pytest.raises(ConfigError, match=reason):
        check_compatible(model, IMAGES, runtime(WORLD))
