"""Fixtures of the tests of sweeps."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def optuna_reads_its_migrations_once():
    """Optuna compiles all migrations of its database whenever a storage is opened.

    It only wants the name of the last one, which is the same each time.
    """
    from optuna.storages._rdb.storage import _VersionManager

    head_version, found = _VersionManager.get_head_version, []

    def get_head_version(manager):
        if not found:
            found.append(head_version(manager))
        return found[0]

    patch = pytest.MonkeyPatch()
    patch.setattr(_VersionManager, "get_head_version", get_head_version)
    yield
    patch.undo()
