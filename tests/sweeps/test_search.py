"""The decisions of the search loop, with fakes around it."""

from types import SimpleNamespace

import pytest

from trainer.cluster import WorkerFailed
from trainer.sweeps.search import Search


@pytest.mark.parametrize("has_left", [False, True])
def test_the_loss_of_a_host_is_no_failure_of_its_trial(has_left):
    """The group knows it, also if Ray only reports that the process died."""
    failures, lines, waiting = [], [], []

    def record_failure(number, reason):
        failures.append(reason)
        return len(failures)

    search = SimpleNamespace(
        _cfg=SimpleNamespace(max_retries=1),
        _directory=SimpleNamespace(log=lambda text: None),
        _study=SimpleNamespace(record_failure=record_failure),
        _table=SimpleNamespace(say=lines.append),
        _wait=waiting.append,
    )
    trial = SimpleNamespace(number=3)
    error = WorkerFailed(0, "h1", "the process died", "SYSTEM_ERROR", has_left=has_left)
    Search._fail(search, trial, error)
    assert waiting == [trial]
    assert len(failures) == (not has_left)
    follows = "it continues on another host" if has_left else "it starts again"
    assert lines == [f"trial 3: worker 0 on h1: the process died; {follows}"]
