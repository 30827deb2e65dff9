"""Elastic runs: the state from which the next group continues, and replays of recorded runs."""

import json

import pytest

from trainer.cluster import Reformed
from trainer.config import ClusterConfig
from trainer.driver.members import Members, read_plan
from trainer.errors import ConfigError
from trainer.messages import STEP_COMPLETE, STEP_COUNTED
from trainer.store.checkpoints import ResumePoint


class Group:
    """A group whose next `reform` returns what the test says."""

    size, nodes = 3, ["a", "b", "c"]

    def __init__(self, kept, source=0, left=(), joined=()):
        self.reformed = Reformed(kept, source, list(left), list(joined))
        self.asked = []

    def reform(self, *arguments):
        self.asked.append(arguments)
        return self.reformed


def entry(phase, step, stage, workers, source=0):
    return {"phase": phase, "step": step, "stage": stage, "workers": workers, "source": source}


def write(path, *entries):
    path.write_text("".join(json.dumps(one) + "\n" for one in entries))
    return ClusterConfig(workers=4, replay=str(path))


@pytest.mark.parametrize(
    ("kept", "phase", "step", "expected"),
    [
        ((1, 12, STEP_COMPLETE), 1, 10, True),
        ((1, 10, STEP_COMPLETE), 1, 10, True),
        ((1, 10, STEP_COUNTED), 1, 10, False),  # the checkpoint is after the evaluation
        ((1, 12, STEP_COUNTED), 1, 0, True),
        ((1, 12, STEP_COUNTED), 2, 0, False),  # that phase has ended
        (None, 1, 10, False),
    ],
)
def test_the_state_of_the_workers_is_used_unless_the_checkpoint_is_later(
    kept, phase, step, expected
):
    members = Members(ClusterConfig(workers=3, min_workers=1))
    members.change(Group(kept, source=2), "worker 0 died")
    point = ResumePoint(phase, step, None, None, [])
    assert members.continues_at(point) == (kept if expected else None)
    message = members.started(Group(None), (phase, step, STEP_COMPLETE))
    assert message.source == (2 if expected else 0)
    assert message.reason == "worker 0 died"


def test_the_reason_of_a_planned_change_names_who_left_and_joined():
    members = Members(ClusterConfig(workers=4, min_workers=1))
    members.change(Group(None, left=["worker 1 on b"], joined=["d", "e"]))
    assert members.started(Group(None), (0, 1, 2)).reason == (
        "worker 1 on b left; 2 workers joined on d, e"
    )


def test_a_recorded_run_is_repeated_position_by_position(tmp_path):
    first, lost, back = entry(0, 0, 2, 4), entry(0, 7, 1, 2, source=3), entry(1, 5, 2, 3)
    void = entry(0, 7, 1, 3)  # at the same position: no step was made
    members = Members(write(tmp_path / "members.jsonl", first, void, lost, back))
    assert members.is_replay
    group = Group((0, 7, 1))
    members.begin(group, (0, 0, 2))
    assert members.leave_at((0, 0, 2)) == (0, 7, 1)
    members.begin(group, (0, 7, 1))
    assert group.asked == [(4, 0), (2, 3)]
    assert members.leave_at((0, 7, 1)) == (1, 5, 2)
    assert members.leave_at((1, 5, 2)) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("{}", "members.jsonl of an elastic run"),
        ("no json", "members.jsonl of an elastic run"),
        (json.dumps(entry(0, 0, 2, 0)), "members.jsonl of an elastic run"),
        (json.dumps(entry(0, 0, 2, 9)), "up to 9 workers; set cluster.workers=9"),
    ],
)
def test_a_file_that_cannot_be_repeated_is_refused(tmp_path, text, message):
    path = tmp_path / "members.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_plan(path, 4)
