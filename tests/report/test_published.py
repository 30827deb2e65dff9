"""Published figures appear only beside runs that can be compared with them."""

import pytest

from trainer.report.published import published

LENET = {"_target_": "trainer.models.LeNet5"}
MNIST = {"_target_": "trainer.data.mnist"}


@pytest.mark.parametrize(
    ("data", "comparable"),
    [
        ({}, True),
        ({"train": None, "validation": 5000, "test": None}, True),
        ({"train": 55_000}, True),
        ({"validation": 10_000}, True),
        ({"train": 6000}, False),
        ({"validation": 20_000}, False),
        ({"test": 1000}, False),
        ({"root": "fashion"}, False),
    ],
)
def test_lenet_must_have_seen_all_of_mnist(data, comparable):
    assert bool(published(LENET, {**MNIST, **data})) == comparable
