"""Ranks that lose another one: their states, and the run that continues from them."""

import random
from dataclasses import dataclass, field

import pytest
import torch

from tests.test_resume import FIT, PHASES, STEPS, config
from trainer.messages import (
    STEP_COMPLETE,
    STEP_COUNTED,
    Checkpoint,
    EpochEnded,
    Handover,
    Notice,
    PhaseEnded,
)
from trainer.store.serialization import to_bytes
from trainer.testing.ranks import run_ranks
from trainer.worker.energy import EnergyMeter
from trainer.worker.run import Start, run_phases

CHECKPOINTS = {"every_steps": 1, "every_seconds": None}
ROUNDS = {
    "train": PHASES["train"],
    "auto": {
        "_target_": "trainer.phases.AutoPrune", "max_drop": 0.5, "rounds": 3, "fit": FIT,
    },
}  # fmt: skip


class Lost(Exception):
    """What a rank that is to be lost raises."""


@dataclass
class Driver:
    """What a driver knows of a run: the ends of phases, and where the next group starts."""

    cfg: object
    start: Start
    checkpoints: dict[tuple[int, int], Checkpoint] = field(default_factory=dict)
    ended: list[bytes] = field(default_factory=list)  # weights
    epochs: list[EpochEnded] = field(default_factory=list)
    handovers: dict[int, Handover] = field(default_factory=dict)  # by rank
    notices: list[str] = field(default_factory=list)
    lost_at: tuple[int, int] | None = None

    def run(self, size, handover=None, victim=None, beats=None, leave_at=None):
        """Run a group; rank `victim` fails at its beat number `beats`."""

        def body(world):
            beat = world.heartbeat.beat

            def fails():
                if world.heartbeat.beats == beats:
                    self.lost_at = world.heartbeat.position
                    raise Lost
                beat()

            if world.rank == victim:
                world.heartbeat.beat = fails
            try:
                world.kept = handover if world.rank == 0 else None
                continues = handover is not None
                for message in run_phases(world, self.cfg, self.start, continues, leave_at):
                    if isinstance(message, Handover):
                        self.handovers[world.rank] = message
                    elif world.rank == 0:
                        self.on(message)
            except (Lost, ConnectionError):
                world.close()

        run_ranks(size, body)

    def on(self, message):
        match message:
            case Checkpoint():
                self.checkpoints[message.phase, message.step] = message
            case EpochEnded():
                self.epochs.append(message)
            case Notice():
                self.notices.append(message.text)
            case PhaseEnded():
                self.ended.append(message.weights)
                dense = self.start.dense or message.weights
                self.start = Start(message.index + 1, message.weights, None, dense)

    def latest(self):
        """The state that the next group continues from, unless a phase has ended since."""
        best = max(self.handovers.values(), key=lambda h: h.position, default=None)
        return best if best is not None and best.checkpoint.phase == self.start.phase else None


def begin(cfg):
    torch.manual_seed(cfg.config.seed)
    return Start(0, to_bytes(cfg.build_model().state_dict()))


@pytest.mark.parametrize(
    ("changes", "attempts"),
    [({}, 3), ({"precision": "fp16"}, 1), ({"phases": ROUNDS}, 1)],
    ids=["sgd", "fp16", "rounds"],
)
@pytest.mark.slow
def test_the_others_continue_without_repeating_a_step(changes, attempts):
    """Wherever a rank is lost, the end is that of a run that changed its size after that step."""
    cfg = config(**changes, checkpoint=CHECKPOINTS)
    undisturbed = Driver(cfg, begin(cfg))
    undisturbed.run(3)
    assert len(undisturbed.ended) == len(cfg.phases)
    chance = random.Random(4)
    stages = set()
    for attempt in range(attempts):
        driver = Driver(cfg, begin(cfg))
        driver.run(3, victim=attempt % 3, beats=chance.randrange(3, 14 * len(cfg.phases)))
        handover = driver.latest()
        expected = Driver(cfg, driver.start)
        if handover is None:
            phase = driver.start.phase  # it has just begun
            expected.run(2)
        else:
            phase, step, stage = handover.position
            stages.add(stage)
            if phase == driver.lost_at[0] and "rounds" not in changes:
                # The last gradients of a rank may be complete when it fails.
                assert step in (driver.lost_at[1], driver.lost_at[1] + 1)
            if (phase, step) in undisturbed.checkpoints:
                same = undisturbed.checkpoints[phase, step]
                expected.run(2, Handover(same, STEP_COMPLETE))
            else:  # the last step of a phase: the weights are those that three ranks trained
                assert step % STEPS == 0
        driver.run(2, handover)
        assert len(driver.ended) == len(cfg.phases)
        assert driver.ended[:phase] == undisturbed.ended[:phase]
        if expected.ended:
            assert driver.ended[phase:] == expected.ended
        else:
            assert driver.ended[phase] == undisturbed.ended[phase]
    assert STEP_COMPLETE in stages
    if handover is not None:  # the last attempt again, from its record: where, and which rank's
        replay = Driver(cfg, begin(cfg))
        replay.run(3, leave_at=handover.position)
        assert {one.position for one in replay.handovers.values()} == {handover.position}
        replay.run(2, replay.handovers[2 if attempt % 3 != 2 else 1])
        assert replay.ended == driver.ended


def test_a_rank_that_is_lost_in_an_evaluation_leaves_it_to_the_others():
    """The epoch is evaluated, and reported, after the change."""
    cfg = config(phases={"train": PHASES["train"]}, checkpoint=CHECKPOINTS)
    undisturbed, driver = Driver(cfg, begin(cfg)), Driver(cfg, begin(cfg))
    undisturbed.run(2)
    # Per step a beat after its batch and one at its end, then one per batch of the evaluation.
    driver.run(2, victim=1, beats=2 * STEPS // 2)
    handover = driver.latest()
    assert handover.position == (0, STEPS // 2, STEP_COUNTED)
    assert driver.epochs == []
    driver.run(1, handover)
    assert [epoch.epoch for epoch in driver.epochs] == [1, 2]
    assert driver.epochs[0].train_loss == undisturbed.epochs[0].train_loss
    assert driver.epochs[0].loss == pytest.approx(undisturbed.epochs[0].loss)


def test_a_rank_that_is_lost_when_an_epoch_is_reported_leaves_it_to_the_others(monkeypatch):
    """The use of energy is added up over the ranks, so one may be missing then, too."""
    total = EnergyMeter.total

    def fails(meter, world):
        if world.size == 2 and world.rank == 1:
            raise Lost
        return total(meter, world)

    monkeypatch.setattr(EnergyMeter, "total", fails)
    cfg = config(phases={"train": PHASES["train"]}, checkpoint=CHECKPOINTS)
    driver = Driver(cfg, begin(cfg))
    driver.run(2)
    handover = driver.latest()
    assert handover.position == (0, STEPS // 2, STEP_COUNTED)
    assert driver.epochs == []
    driver.run(1, handover)
    assert [epoch.epoch for epoch in driver.epochs] == [1, 2]
