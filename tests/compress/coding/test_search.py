"""The search for the best options of the context coder, and the budget that bounds it."""

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.compress.coding import Budget, context, decode_layer, encode_layer, search
from trainer.compress.coding.budget import context_seconds
from trainer.compress.coding.layer import NUMBERS

Levels = NDArray[np.uint16]


def structured() -> Levels:
    """A layer that the context coder makes smallest: outputs and whole kernels were pruned."""
    rng = np.random.default_rng(0)
    density = np.linspace(1, 0, 60).reshape(-1, 1, 1, 1) * rng.integers(0, 2, (60, 4, 1, 1))
    kept = rng.random((60, 4, 3, 3)) < density
    return (rng.integers(1, 9, kept.shape) * kept).astype(np.uint16)


LAYER = structured()
SIZE = LAYER.size
PASSES = 10  # three strides and three further speeds by rows, four speeds by columns


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """A machine on which the context coder takes a second per position; what it encodes."""
    calls: list[tuple[int, tuple[int, ...]]] = []
    real = context.encode

    def encode(levels: Levels, clusters: int, negatives: int, *options: int) -> bytes:
        calls.append((levels.size, (*levels.shape, *options)))
        return real(levels, clusters, negatives, *options)

    monkeypatch.setattr(context, "encode", encode)
    monkeypatch.setattr(search, "context_seconds", lambda levels, *_: float(levels.size))
    return calls


def encoded(seconds: float | None) -> bytes:
    return encode_layer(LAYER, LAYER.shape, 8, budget=Budget(seconds, SIZE))


def test_each_option_is_tried_once(passes: list[tuple[int, tuple[int, ...]]]) -> None:
    assert encoded(None)[0] in (NUMBERS["context"], NUMBERS["columns"])
    assert len(passes) == len(set(passes)) == PASSES


def test_a_budget_that_suffices_changes_nothing(passes: list[tuple[int, tuple[int, ...]]]) -> None:
    assert encoded(PASSES * SIZE) == encoded(None)
    assert len(passes) == 2 * PASSES


@pytest.mark.parametrize("number", range(PASSES + 2))
def test_a_budget_is_spent_and_never_exceeded(
    number: int, passes: list[tuple[int, tuple[int, ...]]]
) -> None:
    blob = encoded((number + 0.5) * SIZE)
    np.testing.assert_array_equal(decode_layer(blob, LAYER.shape, 8), LAYER)
    assert len(passes) == min(number, PASSES)


def test_more_time_gives_no_more_bytes() -> None:
    one_pass = context_seconds(LAYER, 8, 4)
    sizes = [len(encoded(number * one_pass)) for number in range(PASSES + 1)]
    assert sizes[0] > sizes[1] > sizes[-1]
    assert sizes == sorted(sizes, reverse=True)


def test_without_time_only_gaps_are_coded(passes: list[tuple[int, tuple[int, ...]]]) -> None:
    gaps = [encode_layer(LAYER, LAYER.shape, 8, coder=name) for name in ("huffman", "ans")]
    assert encoded(0) == min(gaps, key=len)
    assert passes == []


@pytest.mark.parametrize("available", [1, 1.5, 2, 3, 4, 6, 20])
def test_trials_of_a_large_layer_leave_time_for_all_of_it(
    available: float,
    passes: list[tuple[int, tuple[int, ...]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "_SAMPLE", 500)
    monkeypatch.setattr(search, "_TRIAL", 1000)
    blob = encoded(available * SIZE)
    np.testing.assert_array_equal(decode_layer(blob, LAYER.shape, 8), LAYER)
    assert sum(size for size, _ in passes) <= available * SIZE
    whole = [size for size, _ in passes if size == SIZE]
    assert len(whole) == (0 if available == 1 else 1 if available < 6 else 2)


def test_tensors_share_a_budget_by_their_size() -> None:
    budget = Budget(10.0, elements=100)
    budget.next_tensor(50)
    assert budget.affords(5.0)
    assert not budget.affords(5.1)
    budget.spend(2.0)  # the other three seconds are left for the next tensors
    budget.next_tensor(25)
    assert budget.affords(4.0)
    assert not budget.affords(4.1)
    budget.next_tensor(25)
    assert budget.affords(8.0)
    assert not budget.affords(8.1)


def test_the_estimate_counts_positions_and_decisions() -> None:
    mask = np.eye(10, dtype=np.uint16)
    position = context_seconds(mask, 1, 0) / 100
    assert context_seconds(np.zeros((10, 10), np.uint16), 300, 150) == 100 * position
    near, far = np.full(100, 151, np.uint16), np.full(100, 300, np.uint16)
    smaller, larger = context_seconds(near, 300, 150), context_seconds(far, 300, 150)
    assert 100 * position < smaller < larger


@pytest.mark.parametrize("clusters", [1, 2, 16, 255, 65535])
def test_one_run_of_the_context_coder_is_enough(
    clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A buffer that is too small would have everything encoded again."""
    runs: list[int] = []
    real = context._run
    monkeypatch.setattr(context, "_run", lambda *args, **kw: runs.append(1) or real(*args, **kw))
    rng = np.random.default_rng(0)
    levels = rng.integers(clusters > 1, clusters + 1, (100, 300)).astype(np.uint16)
    context.encode(levels, clusters, clusters // 2, 0, 0, 1)
    assert len(runs) == 1
