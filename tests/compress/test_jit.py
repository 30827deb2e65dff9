"""Functions are compiled where nothing can be cached, too."""

import importlib.util
import threading
import time
from pathlib import Path

import numba
import pytest
from numba.core.caching import CacheImpl

from trainer.compress import codebooks, jit


def twice(x: int) -> int:
    return 2 * x


def test_no_place_for_a_cache(monkeypatch) -> None:
    """As in an image that is mounted read-only, of a user without a home."""
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(twice)
    assert jit.jit(twice)(4) == 8
    spec = importlib.util.spec_from_file_location("fresh", codebooks.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_numba_that_keeps_its_cache_in_another_way(monkeypatch) -> None:
    def njit(cache=False, **options):
        return (lambda f: object()) if cache else (lambda f: f)

    monkeypatch.setattr(jit, "njit", njit)
    assert jit.jit(twice) is twice


def scramble(rounds: int) -> int:
    x = 1
    for _ in range(rounds):
        x = (x * 6364136223846793005 + 1) ^ (x >> 7)
    return x


def test_other_threads_continue_meanwhile() -> None:
    compiled, looks = jit.jit(scramble), 0
    compiled(1)
    work = threading.Thread(target=compiled, args=(100_000_000,))
    work.start()
    while work.is_alive():
        time.sleep(0.001)
        looks += 1
    assert looks > 10  # that held the lock of Python, there would be one or two


def test_the_cache_knows_all_sources_of_the_package() -> None:
    """A change to any of them makes it stale."""
    cache = getattr(codebooks._partition._cache, "_cache_file", None)
    if cache is None:
        pytest.skip("there is no place for a cache here")
    assert cache._source_stamp[1] == jit._sources(Path(jit.__file__).parent)


def cache_file(folder: Path, sources: str) -> jit._CacheFile:
    return jit._CacheFile(str(folder), "twice-1.py311", sources)


def test_a_variant_of_other_sources_is_never_found(tmp_path) -> None:
    """Not even if a process was killed after writing the index of its first variant."""
    cache_file(tmp_path, "old").save("ints", "old variant")
    new = cache_file(tmp_path, "new")
    assert new.load("ints") is None
    new._save_data = lambda *_: None  # killed
    new.save("floats", "new variant")
    assert cache_file(tmp_path, "new").load("floats") is None
    cache_file(tmp_path, "new").save("floats", "new variant")
    assert cache_file(tmp_path, "new").load("floats") == "new variant"


def test_processes_that_compile_at_once_keep_all_variants(tmp_path) -> None:
    """The second one does not read the index before the first one has written it."""
    first, second = cache_file(tmp_path, "new"), cache_file(tmp_path, "new")
    has_read, save = threading.Event(), first._save_index

    def slow(variants: dict[str, str]) -> None:
        has_read.set()
        time.sleep(0.2)
        save(variants)

    first._save_index = slow
    thread = threading.Thread(target=first.save, args=("ints", "of ints"))
    thread.start()
    assert has_read.wait(10)
    second.save("floats", "of floats")
    thread.join()
    assert second.load("ints") == "of ints"
    assert second.load("floats") == "of floats"
