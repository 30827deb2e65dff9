"""A group of real processes whose members come and go."""

import os
import signal
import time

import pytest

from tests.test_resume import PHASES, config
from trainer.cluster import WorkerFailed, open_group
from trainer.config import ClusterConfig
from trainer.messages import Checkpoint, PhaseEnded
from trainer.store.serialization import to_bytes
from trainer.worker.run import Start, run_phases


def weights(messages):
    """What each phase left."""
    return [message.weights for message in messages if isinstance(message, PhaseEnded)]


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
def test_the_others_continue_at_once_and_a_new_worker_gets_the_state_from_them(monkeypatch):
    """Three workers, of which one is killed; two connect; a third joins: no step is repeated."""
    cluster = ClusterConfig(workers=3, min_workers=1, cpus_per_worker=0.25, threads=1)
    phases = {name: PHASES[name] for name in ("train", "prune")}
    cfg = config(phases=phases, checkpoint={"every_steps": 1, "every_seconds": None})
    monkeypatch.setattr("trainer.cluster.elastic.SETTLE_S", 60)  # wait for all three
    group = open_group(cluster)
    try:
        group.start()
        assert group.size == 3
        start = Start(0, to_bytes(cfg.build_model().state_dict()))
        undisturbed = list(group.run(run_phases, cfg, start))
        with pytest.raises(WorkerFailed, match="worker 0 "):  # noqa: PT012
            for message in group.run(run_phases, cfg, start):
                if isinstance(message, Checkpoint) and message.step == 3:
                    os.kill(group._ranks[0].pid, signal.SIGKILL)  # a worker of this test's group
        reformed = group.reform()
        assert (group.size, len(reformed.left), reformed.joined) == (2, 1, [])
        assert reformed.source in (1, 2)
        kept = reformed.kept
        assert kept >= (0, 3, 0)
        while not group._recruits.poll(1):  # within the time limit of the test
            time.sleep(0.1)
        reformed = group.reform()
        assert (group.size, reformed.left, len(reformed.joined)) == (3, [], 1)
        assert reformed.kept == kept
        again = list(group.run(run_phases, cfg, start, True))
        steps = [message.step for message in again if isinstance(message, Checkpoint)]
        assert steps[0] in (kept[1], kept[1] + 1)  # only what followed that step is left to do
        ends = [
            [m.weights for m in run if isinstance(m, PhaseEnded)] for run in (undisturbed, again)
        ]
        assert ends[0] == ends[1]
    finally:
        group.stop()
