"""Runs on streams: resumed in the middle of an epoch, several workers, and what is refused."""

import random
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

import trainer
from tests.test_resume import config, run
from trainer.errors import ConfigError
from trainer.messages import Checkpoint, PhaseEnded
from trainer.testing.ranks import run_ranks
from trainer.worker.run import Start, run_phases


class Images(IterableDataset[Any]):
    """Noise with a bright row, 40 samples in a pass."""

    def __init__(self, noise: float = 0.5) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Any:
        for number in range(40):
            yield number * 7 % 10


class Continuing(Images):
    """Without a length, with a state."""

    begin = at = 0
    __len__ = None  # type: ignore

    def __iter__(self) -> Any:
        for number in range(self.begin, 40):
            self.at = number
            yield number * 7 % 10

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at + 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state["at"]


def digit(row: int, noise: float = 0.0) -> tuple[torch.Tensor, int]:
    image = noise * torch.randn(1, 28, 28) if noise else torch.zeros(1, 28, 28)
    image[0, row] += 1
    return image, row


class Noisy:
    def __init__(self, noise: float = 0.3) -> None:
        self.noise = noise

    def __call__(self, row: int) -> tuple[torch.Tensor, int]:
        return digit(row, self.noise)


def settings(kind: str = "Images", **changes: Any) -> dict[str, Any]:
    source = {"_target_": f"{__name__}.{kind}"}
    convert = {"_target_": f"{__name__}.Noisy", "noise": 0.0}
    return {
        "_target_": "trainer.data.stream",
        "batch_size": 16,
        "train": source,
        "validation": {"_target_": f"{__name__}.Continuing"},
        "test": source,
        "transform": convert,
        **changes,
    }


MODEL = {"_target_": f"{__name__}.net"}
FIT = {"epochs": 2, "schedule": "cosine"}
TRAIN = {"train": {"_target_": "trainer.phases.Train", "fit": FIT}}
PHASES = {**TRAIN, "retrain": {"_target_": "trainer.phases.Retrain", "fit": FIT}}
NOISY = {"_target_": f"{__name__}.Noisy"}


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (settings(train_transform=NOISY), (1, 4)),
        (settings("Continuing", steps_per_epoch=4, shuffle_buffer=5), (0, 5)),
    ],
    ids=["passes", "with a state, shuffled, longer than a pass"],
)
def test_stopped_within_an_epoch_and_resumed_it_ends_in_the_same_bits(
    data: dict[str, Any], place: tuple[int, int]
) -> None:
    checkpoint = {"every_steps": 1, "every_seconds": None}
    cfg = config(data=data, model=MODEL, phases=PHASES, checkpoint=checkpoint)
    undisturbed, validation, _ = run(cfg)
    _, nothing, start = run(cfg, stop_at=place)
    assert nothing is None
    weights, again, _ = run(cfg, start)
    assert (weights, again) == (undisturbed, validation)


def test_two_workers_train_like_one_and_measure_exactly() -> None:
    """The ranks are threads, which share torch's random state: nothing is drawn."""
    data = settings("Continuing", steps_per_epoch=3, shuffle_buffer=9)

    def records(world: Any) -> Any:
        cfg = config(data=data, model=MODEL, phases=TRAIN)
        messages = list(run_phases(world, cfg, Start(0)))
        assert not any(isinstance(message, Checkpoint) for message in messages)
        return [m.record for m in messages if isinstance(m, PhaseEnded)]

    one, *_ = run_ranks(1, records)
    two, *_ = run_ranks(2, records)
    assert one[0].steps == two[0].steps == 6
    assert one[0].train_loss == pytest.approx(two[0].train_loss, rel=1e-5)
    assert one[0].loss == pytest.approx(two[0].loss, rel=1e-5)
    assert one[0].accuracy == two[0].accuracy


def net() -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    for parameter in model.parameters():  # threads share torch's random state
        torch.nn.init.constant_(parameter, 0.01)
    return model


class Unseeded(Images):
    def __iter__(self) -> Any:
        draws = random.SystemRandom()
        return (draws.randrange(10) for _ in range(10**6))


class Empty(Images):
    def __iter__(self) -> Any:
        return iter(())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (settings("Continuing"), "length of this stream is unknown.* set data.steps_per_epoch"),
        (settings("Empty"), "train sample 0: the stream is empty"),
        (settings(validation={"_target_": f"{__name__}.Empty"}), "validation sample 0: the stream"),
        (settings("Unseeded"), "train stream yields other samples when it is read again; draw its"),
        (settings(transform=None), "train sample 0 .*: it must be a pair .*, not int"),
    ],
)
def test_what_is_refused_before_training(data: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        run(config(data=data, model=MODEL, phases=TRAIN))


def test_a_stream_that_is_divided_by_rank_is_refused() -> None:
    def body(world: Any) -> Any:
        parts = {name: [row] * 40 for name, row in (("0", 3), ("1", 4))}
        data = {
            **settings(),
            "train": {"_target_": f"{__name__}.Rows", "rows": parts[str(world.rank)]},
        }
        with pytest.raises(ConfigError, match="workers get different samples of the train stream"):
            list(run_phases(world, config(data=data, model=MODEL, phases=TRAIN), Start(0)))

    run_ranks(2, body)


class Rows(Images):
    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        return iter(self.rows)


def test_live_streams_in_python() -> None:
    parts = [Rows([digit(row) for row in range(10)] * 4) for _ in range(3)]
    experiment = trainer.Experiment(
        model=net(), data=parts, phases=[trainer.phases.Train(epochs=3)], batch_size=8, lr=0.5
    )
    _, (accuracy, _), _ = run(experiment)
    assert accuracy == 1.0
