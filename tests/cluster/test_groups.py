"""One contract for all worker groups: the Ray actors, and this process alone."""

import time

import pytest

from tests.cluster import functions
from trainer.cluster import WorkerFailed, open_group
from trainer.config import ClusterConfig
from trainer.errors import ConfigError

KINDS = [
    pytest.param(ClusterConfig(workers=1, backend="inline"), id="inline"),
    pytest.param(
        ClusterConfig(workers=2, cpus_per_worker=0.25), id="ray", marks=pytest.mark.integration
    ),
]


def started(request):
    if request.param.backend == "ray":
        request.getfixturevalue("shared_ray")
    opened = open_group(request.param)
    opened.start()
    return opened


@pytest.fixture(scope="module", params=KINDS)
def group(request):
    """One group for all functions that end well."""
    opened = started(request)
    yield opened
    opened.stop()


@pytest.fixture(scope="module", params=KINDS)
def doomed(request):
    """Another one for functions that fail, after which it is restarted."""
    opened = started(request)
    yield opened
    opened.stop()


@pytest.fixture(params=KINDS)
def own(request):
    """A group for one test, which may stop it."""
    opened = started(request)
    yield opened
    opened.stop()


def test_rank_0_is_heard_and_all_ranks_run(group):
    everyone = sum(range(group.size))
    assert list(group.run(functions.ranks, 3)) == [(i, 0, group.size, everyone) for i in range(3)]


def test_a_group_stays_warm(group):
    first, second = (list(group.run(functions.environment)) for _ in range(2))
    assert first == second  # the process id included


def test_every_rank_has_a_node(group):
    assert len(group.nodes) == group.size
    assert all(group.nodes)


def test_messages_arrive_while_the_body_runs(group):
    stream = group.run(functions.slow)
    next(stream)
    heard_first = time.time()
    made_second = next(stream)
    assert heard_first < made_second
    assert list(stream) == []


def test_a_request_to_stop_ends_one_run_and_not_the_next(group):
    stream = group.run(functions.until_stopped, 60)
    assert next(stream) == "started"
    group.stop_requested.set()
    assert list(stream) == [True]
    group.stop_requested.clear()
    assert list(group.run(functions.until_stopped, 0)) == ["started", False]


def test_a_request_to_stop_that_came_first_is_heard(group):
    group.stop_requested.set()
    assert list(group.run(functions.until_stopped, 60)) == ["started", True]
    group.stop_requested.clear()


@pytest.mark.parametrize(
    ("body", "reason", "detail"),
    [
        (functions.raises_on_last, "KeyError: 'lost key'", 'raise KeyError("lost key")'),
        (functions.raises_unpicklable, "Unpicklable: odd", "raise Unpicklable(1, 2)"),
    ],
)
def test_a_failure_comes_with_its_rank_node_and_whole_traceback(doomed, body, reason, detail):
    (before,) = doomed.run(functions.environment)
    stream = doomed.run(body)
    assert next(stream) == "before"
    with pytest.raises(WorkerFailed) as error:
        list(stream)
    assert reason in str(error.value)
    assert detail in error.value.detail
    assert error.value.node == doomed.nodes[error.value.rank]
    if body is functions.raises_on_last:
        assert error.value.rank == doomed.size - 1
    doomed.restart()
    assert len(list(doomed.run(functions.ranks, 2))) == 2
    assert list(doomed.run(functions.environment)) == [
        before
    ]  # nobody was lost: the process is warm


def test_a_wrong_configuration_stays_one(own):
    with pytest.raises(ConfigError, match=r"data\.root=/nowhere: there is no such folder"):
        list(own.run(functions.wrong_config))
    own.stop()  # may be called twice: the fixture does it again
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        list(own.run(functions.ranks, 1))


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
class TestRay:
    def test_a_killed_worker_is_told_at_once(self):
        group = open_group(ClusterConfig(workers=2, cpus_per_worker=0.25))
        group.start()
        try:
            begun = time.monotonic()
            with pytest.raises(WorkerFailed, match=r"worker 1 on .*: the process died"):
                list(group.run(functions.dies_on_last))
            assert time.monotonic() - begun < 10  # the peer's collective alone would wait 120 s
        finally:
            group.stop()

    def test_long_work_is_no_hang_and_a_standstill_is_one(self):
        """One rank says that it takes long, the other one shows that it does something."""
        group = open_group(ClusterConfig(workers=2, cpus_per_worker=0.25, hang_timeout_s=2))
        group.start()
        try:
            assert list(group.run(functions.takes_long, 3)) == ["done"]
            with pytest.raises(WorkerFailed, match=r"worker 1 on .*hang_timeout_s=2; last seen "
                               r"in phase train, step 17"):  # fmt: skip
                list(group.run(functions.stands_still))
        finally:
            group.stop()

    def test_threads_and_niceness_are_as_configured(self):
        group = open_group(ClusterConfig(workers=1, cpus_per_worker=0.25, threads=2, nice=5))
        group.start()
        try:
            ((threads, niceness, _, _),) = group.run(functions.environment)
            assert (threads, niceness) == (2, 5)
        finally:
            group.stop()

    def test_more_workers_than_room_says_what_is_missing(self):
        group = open_group(ClusterConfig(workers=64, start_timeout_s=0.5))
        try:
            with pytest.raises(ConfigError, match=r"cluster\.workers=64.*64 CPU needed, .* free"):
                group.start()
        finally:
            group.stop()

    def test_more_gpu_workers_than_gpus(self):
        group = open_group(ClusterConfig(workers=2, device="cuda", gpus_per_worker=8))
        try:
            with pytest.raises(ConfigError, match=r"cluster\.device=cuda: 16 GPUs are needed"):
                group.start()
        finally:
            group.stop()
