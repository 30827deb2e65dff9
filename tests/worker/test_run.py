"""The phases of a run on a worker: its heartbeat, and refused models."""

import random

import numpy as np
import pytest
import torch

import trainer.worker.phase
import trainer.worker.run
from tests.test_resume import FIT, STEPS, config
from trainer.data import Splits, TensorSplit
from trainer.engine.world import World
from trainer.errors import ConfigError, Diverged
from trainer.experiment import Experiment
from trainer.messages import Checkpoint, Notice, PhaseEnded, RunStarted
from trainer.models import LeNet300
from trainer.phases import Phase
from trainer.store.serialization import to_bytes
from trainer.worker.run import Start, run_phases

TRAIN = {"train": {"_target_": "trainer.phases.Train", "fit": {**FIT, "accumulate": 2}}}


def test_long_busy_times_are_not_hangs(monkeypatch):
    """The heartbeat says that the rank is busy before work without beats begins."""
    world = World.single(torch.device("cpu"))
    seen = {}

    def watched(owner, name):
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            seen.setdefault(name, set()).add(world.heartbeat.is_busy)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapper)

    names = []
    for owner, functions in (
        (trainer.worker.run, ["check_compatible"]),
        (trainer.worker.phase, ["pack", "to_bytes"]),
        (Experiment, ["build_data", "build_model"]),
        (Phase, ["enter", "leave"]),
    ):
        for name in functions:
            watched(owner, name)
            names.append(name)
    cfg = config(phases=TRAIN, checkpoint={"every_steps": 3, "every_seconds": None})
    for message in run_phases(world, cfg, Start(0)):
        # While Ray puts a large message into its store, the body stands still.
        large = isinstance(message, Checkpoint | PhaseEnded)
        assert world.heartbeat.is_busy == large, message
        if isinstance(message, RunStarted):
            assert world.heartbeat.where == "at the start"
        else:
            assert world.heartbeat.where.startswith("in phase train")
    assert seen == {name: {True} for name in names}
    assert world.heartbeat.where == f"in phase train, step {STEPS}"


def test_every_micro_batch_and_every_batch_of_an_evaluation_is_a_beat():
    world = World.single(torch.device("cpu"))
    for _ in run_phases(world, config(phases=TRAIN), Start(0)):
        pass
    evaluations, batches = 2, 2  # 20 samples by 16, after each of the two epochs
    assert world.heartbeat.beats == STEPS * (2 + 1) + evaluations * batches


class Refusing(LeNet300):
    """Cannot load a state_dict."""

    def load_state_dict(self, state, strict=True, assign=False):
        raise KeyError("version")


class Forgetting(LeNet300):
    """Loads a state_dict without keeping a weight."""

    def load_state_dict(self, state, strict=True, assign=False):
        super().load_state_dict(state, strict, assign)
        torch.nn.init.zeros_(self.fc1.weight)


@pytest.mark.parametrize(
    ("model", "said"), [(Refusing, "KeyError: 'version'"), (Forgetting, "other weights afterwards")]
)
def test_a_model_that_cannot_be_restored_is_refused_before_it_trains(model, said):
    cfg = config(phases=TRAIN, model={"_target_": f"{__name__}.{model.__name__}"})
    messages = run_phases(World.single(torch.device("cpu")), cfg, Start(0))
    with pytest.raises(ConfigError, match=f"model: a fresh {model.__name__} .*{said}"):
        next(messages)


def test_weights_of_another_model_are_refused():
    weights = to_bytes({"other.weight": torch.zeros(2)})
    messages = run_phases(
        World.single(torch.device("cpu")), config(phases=TRAIN), Start(0, weights)
    )
    with pytest.raises(
        ConfigError, match=r"ConvNet does not fit the weights .*Missing key.*; resume"
    ):
        next(messages)


def test_the_start_announces_the_steps_of_every_phase():
    phases = {**TRAIN, "prune": {"_target_": "trainer.phases.Prune", "fit": {"epochs": 0}}}
    messages = run_phases(World.single(torch.device("cpu")), config(phases=phases), Start(0))
    started = next(messages)
    assert isinstance(started, RunStarted)
    assert started.phase_steps == (STEPS, 0)
    assert not started.sequence_targets  # one class for each image


def test_a_batch_larger_than_the_training_set_is_mentioned():
    data = {**config().config.data, "batch_size": 51}
    messages = run_phases(
        World.single(torch.device("cpu")), config(phases=TRAIN, data=data), Start(0)
    )
    (notice,) = [message.text for message in messages if isinstance(message, Notice)]
    assert notice == (
        "data.batch_size=51 is larger than the training set of 50 samples, which is one batch"
    )


def test_what_quantize_leaves_as_it_is_is_listed_once():
    settings = {"_target_": "trainer.phases.Quantize", "fit": FIT, "exempt": ["unsupported"]}
    cfg = config(
        model={"_target_": f"{__name__}.WithTable"},
        phases={"quantize": settings},
        checkpoint={"every_steps": 3, "every_seconds": None},
    )
    world = World.single(torch.device("cpu"))
    messages = list(run_phases(world, cfg, Start(0)))
    notices = [message.text for message in messages if isinstance(message, Notice)]
    assert notices == ["phases.quantize: not quantized: table (of WithTable)"]
    kept = next(message.content for message in messages if isinstance(message, Checkpoint))
    resumed = run_phases(world, cfg, Start(0, checkpoint=kept))
    assert not [message for message in resumed if isinstance(message, Notice)]


class WithTable(LeNet300):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.ones(2, 2))


def test_weights_that_the_last_update_spoiled_are_not_accepted():
    """The loss before the update was finite, and no step follows."""
    phases = {"train": {**TRAIN["train"], "fit": {"epochs": 1, "max_steps": 1}}}
    cfg = config(phases=phases, optimizer={"_target_": "torch.optim.SGD", "lr": 1e30})
    told = []
    with pytest.raises(Diverged, match=r"phase train: the validation loss is nan .*, after step 1 "
                       r"at a learning rate of 1e\+30"):  # fmt: skip
        told.extend(run_phases(World.single(torch.device("cpu")), cfg, Start(0)))
    assert not any(isinstance(message, PhaseEnded) for message in told)


def drawn(seed, samples=60):
    """Splits as users draw them, by torch's, numpy's and Python's own generators."""
    numbers = torch.arange(samples)
    train, *others = torch.utils.data.random_split(numbers, [40, 10, 10])
    order = [numbers[train.indices], *(numbers[part.indices] for part in others)]
    order[0] = order[0][torch.from_numpy(np.random.permutation(40))]
    order[1] = torch.tensor(random.sample(order[1].tolist(), 10))
    return Splits(*(TensorSplit(part, part) for part in order))


def test_data_that_draws_from_global_generators_is_the_same_wherever_it_is_built():
    """On every rank, after a restart, and when the test set is measured."""
    cfg = config(data={"_target_": f"{__name__}.drawn", "batch_size": 16})
    states = torch.get_rng_state(), random.getstate()
    first = cfg.build_data()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    torch.rand(5), np.random.rand(5), random.random()
    again, other = cfg.build_data(), config(data=cfg.config.data, seed=4).build_data()
    for name, split in vars(first).items():
        assert torch.equal(split.inputs, getattr(again, name).inputs)
        assert not torch.equal(split.inputs, getattr(other, name).inputs)
