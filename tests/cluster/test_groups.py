"""One contract for all worker groups: Ray actors, and the current process."""

import threading
import time

import pytest
import torch

from tests.cluster import functions
from trainer.cluster import WorkerFailed, open_group
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError

KINDS = [
    pytest.param(ClusterConfig(workers=1, backend="inline"), id="inline"),
    pytest.param(
        ClusterConfig(workers=2, cpus_per_worker=0.25), id="ray", marks=pytest.mark.integration
    ),
]


@pytest.fixture(scope="module", params=KINDS)
def group(request):
    """One group for all; a test whose function fails restarts it."""
    if request.param.backend == "ray":
        request.getfixturevalue("shared_ray")
    opened = open_group(request.param)
    opened.start()
    yield opened
    opened.stop()


def check_stop(group):
    group.stop()
    group.stop()  # may be called twice
    with pytest.raises(RuntimeError, match=r"start\(\)"):
        list(group.run(functions.ranks, 1))


def test_every_rank_runs_and_the_messages_of_rank_0_arrive(group):
    everyone = sum(range(group.size))
    assert list(group.run(functions.ranks, 3)) == [(i, 0, group.size, everyone) for i in range(3)]


def test_a_group_stays_warm(group):
    first, second = (list(group.run(functions.environment)) for _ in range(2))
    assert first == second  # the process id included


def test_every_rank_has_a_node(group):
    assert len(group.nodes) == group.size
    assert all(group.nodes)


@pytest.mark.slow
def test_messages_arrive_while_the_function_runs(group):
    stream = group.run(functions.slow)
    next(stream)
    received_first = time.time()
    sent_second = next(stream)
    assert received_first < sent_second
    assert list(stream) == []


def test_a_request_to_stop_ends_one_run_and_not_the_next(group):
    stream = group.run(functions.until_stopped, 60)
    assert next(stream) == "started"
    group.stop_requested.set()
    assert list(stream) == [True]
    group.stop_requested.clear()
    assert list(group.run(functions.until_stopped, 0)) == ["started", False]


def test_a_request_to_stop_may_precede_the_run(group):
    group.stop_requested.set()
    assert list(group.run(functions.until_stopped, 60)) == ["started", True]
    group.stop_requested.clear()


def test_functions_and_classes_of_a_notebook_reach_the_workers(group):
    notebook = {"__name__": "__main__"}
    exec(
        "class Base:\n    bits = 5\n"
        "class Model(Base): pass\n"
        "def function(world, model, kind):\n    yield model.bits, isinstance(model, kind)\n",
        notebook,
    )
    model, kind = notebook["Model"](), notebook["Base"]
    assert list(group.run(notebook["function"], model, kind)) == [(5, True)]


def test_the_memory_of_a_function_is_released(group):
    assert list(group.run(functions.leaves_a_cycle)) == [1]  # the collector does not run by itself
    assert list(group.run(functions.living_cycles)) == [0]


def test_a_group_is_usable_after_its_iterator_was_closed_early(group):
    (before,) = group.run(functions.environment)
    stream = group.run(functions.endless)
    assert next(stream) == "running"
    stream.close()
    group.restart()
    assert list(group.run(functions.environment)) == [before]


@pytest.mark.parametrize(
    ("function", "reason", "detail"),
    [
        (functions.raises_on_last, "KeyError: 'lost key'", 'raise KeyError("lost key")'),
        (functions.raises_unpicklable, "Unpicklable: odd", "raise Unpicklable(1, 2)"),
    ],
)
def test_a_failure_comes_with_its_rank_node_and_whole_traceback(group, function, reason, detail):
    (before,) = group.run(functions.environment)
    messages = []
    with pytest.raises(WorkerFailed) as error:  # noqa: PT012
        for message in group.run(function):
            messages.append(message)
    if error.value.rank == 0:  # the failure of another rank may arrive before these
        assert messages == ["before"]
    assert reason in str(error.value)
    assert detail in error.value.detail
    assert error.value.node == group.nodes[error.value.rank]
    if function is functions.raises_on_last:
        assert error.value.rank == group.size - 1
    group.restart()
    assert len(list(group.run(functions.ranks, 2))) == 2
    assert list(group.run(functions.environment)) == [before]  # the same warm process


def test_a_wrong_configuration_raises_config_error(group):
    with pytest.raises(ConfigError, match=r"data\.root=/nowhere: there is no such folder"):
        list(group.run(functions.wrong_config))
    group.restart()


def test_a_stopped_inline_group_runs_nothing():
    group = open_group(ClusterConfig(workers=1, backend="inline"))
    group.start()
    check_stop(group)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_inline_group_leaves_torch_as_it_was_in_any_thread(threads):
    """In a notebook the user's own code runs in the same process."""
    group = open_group(ClusterConfig(workers=1, backend="inline", threads=threads))
    group.start()
    found = []

    def run():
        torch.set_num_threads(2)
        found.extend(group.run(functions.environment))
        found.append(torch.get_num_threads())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert (found[0][0], found[1]) == (threads, 2)
    stream = group.run(functions.endless)
    next(stream)
    stream.close()
    assert torch.get_num_threads() == 1  # set by conftest.py


@pytest.mark.integration
@pytest.mark.usefixtures("shared_ray")
class TestRay:
    @pytest.mark.parametrize("group", KINDS[1:], indirect=True)
    def test_what_cannot_be_sent_fails_at_once_with_a_reason(self, group):
        with pytest.raises(ConfigError, match=r"a lock cannot be sent.*cannot pickle"):
            list(group.run(functions.receives, threading.Lock()))
        assert list(group.run(functions.receives, 1)) == ["received"]
        with pytest.raises(RunError, match=r"'no_such_module'; cluster\.working_dir"):
            list(group.run(functions.receives, functions.Unloadable()))
        group.restart()
        with pytest.raises(RunError, match="a message cannot be sent: cannot pickle"):
            list(group.run(functions.sends_a_lock))
        group.restart()

    @pytest.mark.parametrize("group", KINDS[1:], indirect=True)
    def test_a_killed_worker_is_reported_at_once(self, group):
        begun = time.monotonic()
        with pytest.raises(WorkerFailed, match=r"worker 1 on .*: the process died"):
            list(group.run(functions.dies_on_last))
        assert time.monotonic() - begun < 10  # the peer's collective alone would wait 120 s
        group.restart()

    def test_settings_of_workers_hangs_and_stopping(self):
        """Rank 0 is busy while rank 1 makes progress; then rank 1 does nothing."""
        cfg = ClusterConfig(workers=2, cpus_per_worker=0.25, hang_timeout_s=2, threads=2, nice=5)
        group = open_group(cfg)
        group.start()
        try:
            ((threads, niceness, _, _),) = group.run(functions.environment)
            assert (threads, niceness) == (2, 5)
            assert list(group.run(functions.takes_long, 3)) == ["done"]
            with pytest.raises(WorkerFailed, match=r"worker 1 on .*hang_timeout_s=2; last seen "
                               r"in phase train, step 17"):  # fmt: skip
                list(group.run(functions.stands_still))
            check_stop(group)
        finally:
            group.stop()

    def test_too_many_workers_report_the_missing_resources(self):
        group = open_group(ClusterConfig(workers=64, start_timeout_s=0.5))
        try:
            with pytest.raises(ConfigError, match=r"cluster\.workers=64.*64 CPU needed, .* free"):
                group.start()
        finally:
            group.stop()

    def test_more_gpu_workers_than_gpus(self):
        group = open_group(ClusterConfig(workers=64, cpus_per_worker=0.01, device="cuda"))
        try:
            with pytest.raises(ConfigError, match=r"cluster\.device=cuda: 64 GPUs are needed"):
                group.start()
        finally:
            group.stop()
