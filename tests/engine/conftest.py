"""Several ranks in one process, as fixtures."""

from collections.abc import Callable
from typing import Any

import pytest

from trainer.testing.ranks import run_ranks, run_threads


@pytest.fixture(scope="session")
def ranks() -> Callable[..., list[Any]]:
    return run_ranks


@pytest.fixture(scope="session")
def threads() -> Callable[..., list[Any]]:
    return run_threads
