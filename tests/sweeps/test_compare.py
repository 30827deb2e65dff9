"""Comparisons: conditions of parameters, bounds of constraints."""

import pytest

from trainer.errors import ConfigError
from trainer.sweeps.compare import excess, parse_bound, parse_condition, satisfied


@pytest.mark.parametrize(
    ("text", "values", "holds"),
    [
        ("a >= 2", {"a": 2}, True),
        ("a>2", {"a": 2}, False),
        ("a.b == x", {"a.b": "x"}, True),
        ("a != true", {"a": False}, True),
        ("a >= 2 and b < 0.5", {"a": 2, "b": 0.25}, True),
        ("a >= 2 and b < 0.5", {"a": 2, "b": 0.5}, False),
        ("a >= 2", {}, False),
    ],
)
def test_conditions(text, values, holds):
    assert satisfied(parse_condition("key", text), values) == holds


def test_bounds():
    at_least, at_most = parse_bound("key", ">= 0.98"), parse_bound("key", "<=40000")
    assert excess(at_least, 0.97) == pytest.approx(0.01)
    assert excess(at_least, 0.99) < 0
    assert excess(at_most, 50_000) == 10_000
    assert excess(at_most, 40_000) == 0


@pytest.mark.parametrize("text", ["0.98", "> 0.98", ">= much", "a >= 1", ">="])
def test_invalid_bounds_are_refused(text):
    with pytest.raises(ConfigError, match="key="):
        parse_bound("key", text)
