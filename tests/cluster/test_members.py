"""Who belongs to the next group, and what leaves the budget of restarts alone: pure functions."""

from trainer.cluster.members import Answer, choose, to_drop
from trainer.cluster.restart import WorkerLoss, why_not_restart

EARLIER, LATER = (0, 7, 2), (0, 8, 0)


def ranks(answers):
    return [answer.rank for answer in answers]


def test_the_latest_state_becomes_rank_0_and_the_others_keep_their_order():
    answers = [Answer(3, LATER), Answer(0, EARLIER), Answer(2, LATER), Answer(1, None)]
    assert ranks(choose(answers, 0, 1)) == [2, 0, 1, 3]
    assert ranks(choose([Answer(1, None), Answer(0, None)], 0, 1)) == [0, 1]
    assert choose([], 2, 1) == []


def test_workers_whose_host_leaves_stay_only_where_too_few_would_be_left():
    answers = [Answer(0, LATER, leaves=True), Answer(1, LATER), Answer(2, LATER, leaves=True)]
    assert ranks(choose(answers, 0, 1)) == [1]
    assert ranks(choose(answers, 0, 2)) == [0, 1]
    assert ranks(choose(answers, 1, 2)) == [1]
    assert ranks(choose(answers, 0, 3)) == [0, 1, 2]


def test_the_rank_that_the_others_cannot_reach_is_left_out():
    assert to_drop([0, 2, 3], [2, None, 2]) == 2
    assert to_drop([1, 2], [2, 1]) == 2  # they cannot reach each other: rank 0 is none of them
    assert to_drop([0, 1], [None, None]) == 1


def test_hosts_that_leave_use_up_no_restarts():
    left = WorkerLoss("the process died", (0, 3), has_left=True)
    died = WorkerLoss("the process died", (0, 3))
    assert why_not_restart([left] * 9, 0) is None
    assert why_not_restart([left, left, died], 1) is None
    assert "cluster.max_restarts=0" in why_not_restart([left, died], 0)
