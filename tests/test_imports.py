"""The garbage collector is paused while large packages are imported."""

import gc
from collections.abc import Iterator
from importlib import import_module

import pytest

from trainer.imports import collector_paused


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("enabled", [True, False])
def test_afterwards_the_collector_is_as_before(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with collector_paused():
        assert not gc.isenabled()
    assert gc.isenabled() == enabled


def test_an_import_that_fails_does_not_leave_it_paused() -> None:
    with pytest.raises(ModuleNotFoundError), collector_paused():
        import_module("there_is_no_such_module")
    assert gc.isenabled()
