"""Layers that are sensitive keep more, floors hold, and the sum is what was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.compress.allocation import allocate

FLAT = ((0.7, 0.0), (0.5, 0.01), (0.3, 0.05), (0.15, 0.2))
STEEP = ((0.7, 0.1), (0.5, 0.5), (0.3, 2.0), (0.15, 5.0))


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8, 0.95])
def test_the_sensitive_layer_keeps_more(fraction: float) -> None:
    kept = {"a": 10_000, "b": 10_000}
    made = allocate(kept, {"a": FLAT, "b": STEEP}, {"a": 1, "b": 1}, fraction)
    assert sum(made.values()) == pytest.approx(20_000 * fraction, rel=0.01)
    assert made["a"] < made["b"] <= 10_000


def test_alike_layers_are_pruned_alike() -> None:
    made = allocate({"a": 1000, "b": 3000}, {"a": STEEP, "b": STEEP}, {"a": 1, "b": 1}, 0.5)
    assert made["b"] == pytest.approx(3 * made["a"], abs=3)
    assert sum(made.values()) == pytest.approx(2000, abs=3)


def test_a_layer_at_its_floor_leaves_the_rest_to_the_others() -> None:
    made = allocate({"a": 1000, "b": 1000}, {"a": FLAT, "b": STEEP}, {"a": 900, "b": 1}, 0.75)
    assert made["a"] == 900
    assert made["b"] == pytest.approx(600, abs=2)


def test_a_noisy_curve_that_falls_is_taken_as_flat() -> None:
    noisy = ((0.7, 0.05), (0.5, -0.1), (0.3, 0.05), (0.15, 0.3))
    made = allocate({"a": 1000, "b": 1000}, {"a": noisy, "b": noisy}, {"a": 1, "b": 1}, 0.3)
    assert 290 <= made["a"] == made["b"] <= 310


@pytest.mark.parametrize("rises", [(0.0, 0.0, 0.0, 0.0), (-0.1, -0.2, -0.3, -0.4)])
def test_a_layer_that_no_probe_hurts_is_pruned_as_far_as_is_asked(rises) -> None:
    curve = tuple(zip((0.7, 0.5, 0.3, 0.15), rises, strict=True))
    assert allocate({"a": 1000}, {"a": curve}, {"a": 1}, 0.5) == {"a": 500}
    assert (
        sum(
            allocate({"a": 500, "b": 500}, {"a": curve, "b": STEEP}, {"a": 1, "b": 1}, 0.6).values()
        )
        == 600
    )


def test_nothing_is_pruned_beyond_what_was_measured() -> None:
    assert allocate({"a": 1000}, {"a": FLAT}, {"a": 1}, 0.01) == {"a": 150}


@given(
    st.dictionaries(
        st.sampled_from("abc"),
        st.tuples(
            st.integers(1, 10_000),
            st.lists(st.floats(-1, 5), min_size=4, max_size=4),
            st.floats(0, 1),
        ),
        min_size=1,
    ),
    st.floats(0.05, 0.99),
)
def test_whatever_was_measured_the_numbers_are_possible(layers, fraction: float) -> None:
    kept = {name: number for name, (number, _, _) in layers.items()}
    points = (0.7, 0.5, 0.3, 0.15)
    curves = {n: tuple(zip(points, rises, strict=True)) for n, (_, rises, _) in layers.items()}
    floors = {name: max(1, int(floor * n)) for name, (n, _, floor) in layers.items()}
    made = allocate(kept, curves, floors, fraction)
    for name, number in made.items():
        assert min(floors[name], kept[name]) <= number <= kept[name]
    least = sum(min(n, max(floors[name], round(0.15 * n))) for name, n in kept.items())
    wanted = max(least, fraction * sum(kept.values()))
    assert wanted - 1e-6 <= sum(made.values()) <= wanted + len(kept)
