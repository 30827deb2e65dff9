"""Runs whose gradients are averaged approximately: they resume with the same bits."""

import pytest

from tests.test_resume import PHASES, config
from tests.worker.test_handover import Driver, begin
from trainer.messages import STEP_COMPLETE
from trainer.store.serialization import unpack
from trainer.worker.run import Start

CHECKPOINTS = {"every_steps": 3, "every_seconds": None}
ONESHOT = {"_target_": "trainer.phases.Prune", "sparsity": 0.8, "schedule": "oneshot"}
SHORT = {"train": PHASES["train"], "prune": ONESHOT} | {k: PHASES[k] for k in ("retrain", "share")}


@pytest.mark.parametrize("settings", [{"wire": "int8"}], ids=str)
def test_an_interrupted_run_ends_with_the_same_bits(settings):
    """In a dense phase, in one with packed weights, and in one with codebooks."""
    cfg = config(phases=SHORT, checkpoint=CHECKPOINTS, allreduce=settings)
    undisturbed = Driver(cfg, begin(cfg))
    undisturbed.run(2)
    assert len(undisturbed.ended) == len(SHORT)
    for (phase, step), checkpoint in undisturbed.checkpoints.items():
        if (phase, step) in ((0, 3), (2, 6), (3, 6)):
            before = undisturbed.ended[phase - 1] if phase else begin(cfg).weights
            start = Start(phase, before, checkpoint.content, undisturbed.ended[0], step)
            resumed = Driver(cfg, start)
            resumed.run(2)
            assert resumed.ended == undisturbed.ended[phase:]


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
