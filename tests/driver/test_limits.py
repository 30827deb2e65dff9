"""Limits on the result of a run."""

import pytest

from trainer.config import LimitsConfig
from trainer.driver.limits import missed_limits

SUMMARY = {
    "accuracy": 0.985,
    "baseline_accuracy": 0.99,
    "artifact": {"accuracy": 0.98, "ratio": 100.0, "bytes": 10_000},
}


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({}, []),
        ({"max_accuracy_drop": 0.011, "min_ratio": 100, "max_megabytes": 0.01}, []),
        ({"max_accuracy_drop": 0.009}, ["max_accuracy_drop=0.009"]),
        ({"min_ratio": 101}, ["min_ratio=101"]),
        ({"max_megabytes": 0.0099}, ["max_megabytes=0.0099"]),
        (
            {"max_accuracy_drop": 0, "min_ratio": 1000, "max_megabytes": 0.001},
            ["max_accuracy_drop", "min_ratio", "max_megabytes"],
        ),
    ],
)
def test_each_limit_that_is_missed_is_said(limits, said):
    found = missed_limits(SUMMARY, LimitsConfig(**limits))
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


def test_without_an_artefact_the_final_model_counts():
    summary = {**SUMMARY, "artifact": None}
    assert missed_limits(summary, LimitsConfig(max_accuracy_drop=0.006)) == []
    assert len(missed_limits(summary, LimitsConfig(max_accuracy_drop=0.004))) == 1


def test_a_drop_equal_to_the_limit_is_allowed():
    """In floats 0.9912 - 0.9892 is more than 0.002."""
    summary = {"baseline_accuracy": 0.9912, "accuracy": 0.9892}
    assert missed_limits(summary, LimitsConfig(max_accuracy_drop=0.002)) == []
    assert len(missed_limits(summary, LimitsConfig(max_accuracy_drop=0.001999))) == 1
