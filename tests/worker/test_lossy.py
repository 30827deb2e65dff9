"""Runs whose gradients are averaged approximately: they resume with the same bits."""

import pytest

from tests.test_resume import PHASES, config
from tests.worker.test_handover import Driver, begin
from trainer.engine.world import World
from trainer.messages import STEP_COMPLETE
from trainer.store.serialization import unpack
from trainer.worker.run import Start

CHECKPOINTS = {"every_steps": 3, "every_seconds": None}
ONESHOT = {"_target_": "trainer.phases.Prune", "sparsity": 0.8, "schedule": "oneshot"}
SHORT = {"train": PHASES["train"], "prune": ONESHOT} | {k: PHASES[k] for k in ("retrain", "share")}


@pytest.mark.parametrize(
    ("settings", "phases", "points"),
    [
        ({"wire": "int8"}, SHORT, {(0, 3), (3, 6)}),
        (
            {"compression": "powersgd", "rank": 1, "whole_steps": 4},
            {"train": PHASES["train"]},
            {(0, 3), (0, 6)},
        ),
        ({"local_steps": 2}, {"train": PHASES["train"]}, {(0, 4), (0, 6)}),
    ],
    ids=["int8", "powersgd", "local"],
)
def test_an_interrupted_run_ends_with_the_same_bits(settings, phases, points):
    """In a dense phase, one with packed weights, one with codebooks, and between two averages."""
    cfg = config(phases=phases, checkpoint=CHECKPOINTS, allreduce=settings)
    undisturbed = Driver(cfg, begin(cfg))
    undisturbed.run(2)
    assert len(undisturbed.ended) == len(phases)
    assert points <= set(undisturbed.checkpoints)
    if (
        "local_steps" in settings
    ):  # a checkpoint that is due at step 3 is written at the next average
        assert points == set(undisturbed.checkpoints)
    for phase, step in points:
        ranks = unpack(undisturbed.checkpoints[phase, step].content)["ranks"]
        assert len(ranks) == 2
        if step > settings.get("whole_steps", 0):
            assert str(ranks[0]) != str(ranks[1])  # so it matters whose state a rank gets
        before = undisturbed.ended[phase - 1] if phase else begin(cfg).weights
        content = undisturbed.checkpoints[phase, step].content
        resumed = Driver(cfg, Start(phase, before, content, undisturbed.ended[0], step))
        resumed.run(2)
        assert resumed.ended == undisturbed.ended[phase:]


@pytest.mark.parametrize(
    "settings",
    [
        {"wire": "int8", "error_feedback": False},
        {"compression": "powersgd", "rank": 1, "whole_steps": 1, "error_feedback": False},
    ],
    ids=["int8", "powersgd"],
)
def test_a_checkpoint_gathers_no_states_that_do_not_exist(settings, monkeypatch):
    """Without error feedback all ranks have the same state."""
    gathered = []
    monkeypatch.setattr(World, "gather", lambda world, content: gathered.append(content) or [])
    cfg = config(phases={"train": PHASES["train"]}, checkpoint=CHECKPOINTS, allreduce=settings)
    driver = Driver(cfg, begin(cfg))
    driver.run(2)
    assert "ranks" not in unpack(driver.checkpoints[0, 3].content)
    assert not gathered


def test_a_phase_that_works_after_each_step_averages_gradients():
    cfg = config(
        phases={"train": PHASES["train"], "prune": PHASES["prune"]}, allreduce={"local_steps": 4}
    )
    driver = Driver(cfg, begin(cfg))
    driver.run(2)
    assert driver.notices == [
        "phase prune: gradients were averaged in each step, since prune changes the model after "
        "each step; allreduce.local_steps is for other phases"
    ]
    alone = Driver(cfg, begin(cfg))
    alone.run(1)
    assert alone.notices == []  # one worker has nothing to average


def test_an_elastic_run_starts_from_zero_errors_when_its_members_change():
    """So the record of its members, which knows no errors, is enough to repeat it."""
    phases = {"train": PHASES["train"]}
    ends = {}
    for elastic in (False, True):
        cfg = config(
            phases=phases,
            checkpoint=CHECKPOINTS,
            allreduce={"wire": "int8"},
            cluster={"workers": 2, "min_workers": 1 if elastic else None},
        )
        undisturbed, driver = Driver(cfg, begin(cfg)), Driver(cfg, begin(cfg))
        undisturbed.run(2)
        checkpoint = undisturbed.checkpoints[0, 3]
        driver.run(2, leave_at=(0, 3, STEP_COMPLETE))
        assert ("ranks" in unpack(checkpoint.content)) == (not elastic)
        resumed = Driver(cfg, Start(0, begin(cfg).weights, checkpoint.content, None, 3))
        resumed.run(2)
        driver.run(2, driver.latest())
        ends[elastic] = resumed.ended == driver.ended
    assert ends == {False: False, True: True}
