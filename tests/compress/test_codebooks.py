"""One-dimensional k-means: its error, unchanged values, and refused settings."""

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.compress import codebooks
from trainer.compress.codebooks import (
    _GROUPS,
    INITS,
    MAX_CLUSTERS,
    Codebook,
    cluster,
    codebook_of,
    distinct_values,
    exact,
)
from trainer.errors import Diverged


def dense(book: Codebook) -> Tensor:
    return torch.cat((book.values.new_zeros(1), book.values))[book.codes]


def error(weights: Tensor, book: Codebook) -> float:
    return float((weights.double() - dense(book).double()).square().sum())


def least_error(values: list[float], k: int) -> float:
    """Of all partitions of sorted values into k runs."""
    ordered = np.sort(np.array(values))
    best = np.inf
    for cuts in combinations(range(1, len(ordered)), k - 1):
        runs = np.split(ordered, cuts)
        best = min(best, sum(((run - run.mean()) ** 2).sum() for run in runs))
    return float(best)


@given(
    st.lists(st.integers(-60, 60).filter(bool), min_size=2, max_size=8, unique=True),
    st.integers(1, 3),
)
@pytest.mark.slow
def test_exact_is_the_optimum(values: list[int], k: int) -> None:
    k = min(k, len(values) - 1)
    weights = torch.tensor(values, dtype=torch.float64)
    book = cluster(weights, k, "exact")
    assert error(weights, book) == pytest.approx(least_error([float(v) for v in values], k))


def test_exact_on_more_values_than_it_takes_at_once() -> None:
    torch.manual_seed(0)
    weights = torch.randn(3 * _GROUPS)
    best = error(weights, cluster(weights, 16, "exact"))
    for init in ("linear", "density", "random"):
        assert best <= error(weights, cluster(weights, 16, init)) * (1 + 1e-9)
    # Lloyd & Max's quantizer of a normal variable with 16 levels: 0.009497 of the variance.
    assert best / len(weights) == pytest.approx(0.009497, rel=0.03)


@pytest.mark.parametrize("k", [15, 16, 17, 60])
def test_exact_with_as_many_clusters_as_groups(k: int, monkeypatch) -> None:
    monkeypatch.setattr(codebooks, "_GROUPS", 16)
    torch.manual_seed(0)
    weights = torch.randn(200)
    begin = exact(np.sort(weights.double().numpy()), k)
    assert len(begin) == k
    assert np.isfinite(begin).all()
    book = cluster(weights, k, "exact")
    assert len(book.values) == k
    assert error(weights, book) < 1.5 * error(weights, cluster(weights, k, "density"))


def test_the_table_of_exact_is_bounded(monkeypatch) -> None:
    made = []

    def partition(counts, sums, squares, k):
        made.append((len(counts) - 1) * k)
        return np.linspace(0, len(counts) - 1, k + 1).astype(np.int64)

    monkeypatch.setattr(codebooks, "_TABLE", 1 << 12)
    monkeypatch.setattr(codebooks, "_partition", partition)
    values = np.sort(np.random.default_rng(0).normal(size=5000))
    for k in (2, 10, 63, 64, 3000):
        assert len(exact(values, k)) == k
    assert len(made) == 3
    assert max(made) <= 1 << 12


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("k", [1, 2, 5, 32])
def test_clustering_is_never_worse_than_where_it_begins(init: str, k: int) -> None:
    torch.manual_seed(1)
    weights = torch.randn(40, 50).double() ** 3
    ordered = np.sort(weights.flatten().numpy())
    begin = INITS[init](ordered, k)
    assert len(begin) == k
    assert (np.diff(begin) >= 0).all()
    before = np.abs(ordered[:, None] - begin).min(1)
    book = cluster(weights, k, init)
    assert len(book.values) <= k
    assert error(weights, book) <= (before**2).sum() * (1 + 1e-12)
    # A fixed point: values are the means of their clusters, and each weight has the nearest value.
    for i, value in enumerate(book.values, 1):
        assert value == pytest.approx(float(weights[book.codes == i].mean()), abs=1e-7)
    nearest = (weights.flatten()[:, None] - book.values).abs().min(1).values
    assert torch.allclose((weights - dense(book)).abs().flatten(), nearest)


def test_where_each_begins() -> None:
    ordered = np.array([1.0, 1.0, 1.0, 1.0, 2.0, 9.0])
    assert INITS["linear"](ordered, 3).tolist() == [1, 5, 9]
    assert INITS["density"](ordered, 3).tolist() == [1, 1, 9]
    drawn = INITS["random"](ordered, 3)
    assert set(drawn) <= {1.0, 2.0, 9.0}
    assert drawn.tolist() == INITS["random"](ordered, 3).tolist()
    assert exact(ordered, 3).tolist() == [1, 2, 9]


@pytest.mark.parametrize("init", INITS)
def test_zeros_stay_and_have_no_say(init: str) -> None:
    torch.manual_seed(0)
    weights = torch.randn(30, 40) + 3
    sparse = weights * (torch.rand(30, 40) < 0.2)
    book = cluster(sparse, 8, init)
    assert torch.equal(book.codes == 0, sparse == 0)
    assert book.codes.dtype == torch.int32
    assert book.codes.shape == sparse.shape
    alone = cluster(sparse[sparse != 0], 8, init)
    assert torch.equal(book.values, alone.values)
    assert (book.values.diff() > 0).all()
    assert int(book.codes.max()) == len(book.values)


@given(st.lists(st.sampled_from([-2.5, -0.1, 0.0, 0.3, 7.0]), max_size=30), st.integers(5, 9))
def test_as_many_clusters_as_values_keep_them_exactly(values: list[float], k: int) -> None:
    weights = torch.tensor(values)
    book = cluster(weights, k)
    assert torch.equal(dense(book), weights)
    assert len(book.values) == len(set(values) - {0.0})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_values_have_the_type_of_the_weights(dtype: torch.dtype) -> None:
    assert cluster(torch.randn(50).to(dtype), 4).values.dtype == dtype


def test_equal_and_subnormal_and_extreme_values() -> None:
    assert cluster(torch.full((9,), 3.0), 1).values.tolist() == [3.0]
    assert cluster(torch.zeros(4, 5), 3).values.numel() == 0
    assert cluster(torch.empty(0, 5), 3).codes.shape == (0, 5)
    tiny = torch.tensor([1e-45, 2.8e-45, 1.0, 1.1])
    assert len(cluster(tiny, 2).values) == 2
    wide = torch.tensor([-3e38, -1.0, 1.0, 3e38])
    assert cluster(wide, 3).values.isfinite().all()


def test_a_price_of_bits_lowers_the_entropy_at_some_error() -> None:
    torch.manual_seed(0)
    weights = torch.randn(20_000)
    rates = [0.0, 0.01, 0.05, 0.2]
    books = [cluster(weights, 32, "linear", rate) for rate in rates]
    entropies, errors = [], [error(weights, book) for book in books]
    for book in books:
        p = book.codes.flatten().bincount()[1:].double() / len(weights)
        p = p[p > 0]
        entropies.append(float(-(p * p.log2()).sum()))
    assert entropies == sorted(entropies, reverse=True)
    assert errors == sorted(errors)
    assert entropies[-1] < 0.7 * entropies[0]
    # It minimises error + rate * bits: no other book does better at its rate.
    for i, rate in enumerate(rates):
        costs = [e / len(weights) + rate * h for e, h in zip(errors, entropies, strict=True)]
        assert costs[i] <= min(costs) * 1.01


@pytest.mark.parametrize("k", [0, -1, MAX_CLUSTERS + 1])
def test_numbers_out_of_range_are_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"{k} clusters: there must be 1 to 65535"):
        cluster(torch.randn(9), k)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_diverged_are_refused(value: float) -> None:
    with pytest.raises(Diverged, match="Inf or NaN"):
        cluster(torch.tensor([1.0, 2.0, value, 3.0]), 2)


def test_codebook_of_finds_what_cluster_made() -> None:
    torch.manual_seed(0)
    values = torch.randn(16)
    weights = values[torch.randint(16, (50, 60))] * (torch.rand(50, 60) < 0.3)
    book = codebook_of(weights)
    assert book is not None
    assert torch.equal(dense(book), weights)
    assert len(book.values) == 16
    assert (book.values.diff() > 0).all()
    assert codebook_of(weights, max_values=15) is None
    assert codebook_of(torch.randn(50, 60)) is None
    late = torch.cat((torch.ones(5000), torch.randn(5000)))
    assert codebook_of(late, max_values=16) is None


def test_codebook_of_corners() -> None:
    for weights in (torch.zeros(3, 4), torch.empty(0, 4), torch.ones(1), torch.tensor([0.0, 2.0])):
        book = codebook_of(weights)
        assert book is not None
        assert torch.equal(dense(book), weights)
    assert codebook_of(torch.tensor([1.0, 2.0, 3.0])) is None  # more than half as many values
    book = codebook_of(torch.tensor([1.0, 1.0, 3.0, 3.0]))
    assert book is not None
    assert book.values.tolist() == [1.0, 3.0]


def test_any_repeated_value_can_count_as_few() -> None:
    torch.manual_seed(0)
    values = torch.randn(32)
    weights = torch.cat((torch.zeros(40), values[torch.arange(60) % 32]))
    assert codebook_of(weights) is None
    book = codebook_of(weights, any_repeat=True)
    assert book is not None
    assert torch.equal(dense(book), weights)
    assert len(book.values) == 32
    assert codebook_of(weights[:72], any_repeat=True) is None  # 32 of 32
    assert codebook_of(weights[:73], any_repeat=True) is not None
    assert codebook_of(weights, 31, any_repeat=True) is None


@pytest.mark.parametrize("number", [100, 3000, 50_000])
def test_what_repeats_by_chance_is_not_few(number: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for weights in (torch.randn(number, generator=generator), torch.rand(number)):
        assert distinct_values(weights, any_repeat=True) is None
    repeated = weights[torch.arange(number) % (number * 9 // 10)]
    assert distinct_values(repeated, any_repeat=True) is not None


def test_nan_is_not_a_value() -> None:
    assert codebook_of(torch.tensor([1.0, 1.0, 1.0, torch.nan, 2.0, 2.0])) is None


def with_outliers() -> Tensor:
    """Weights of which the largest is more than 100 standard deviations from zero."""
    generator = torch.Generator().manual_seed(0)
    weights = 0.02 * torch.randn(300, 200, generator=generator)
    weights[0, :3] = torch.tensor([9.0, -7.0, 4.0])
    assert weights.abs().max() / weights.std() > 100
    return weights


@pytest.mark.parametrize("init", ["linear", "random"])
@pytest.mark.parametrize("k", [8, 16, 63, 256])
@pytest.mark.slow
def test_outliers_leave_no_cluster_without_weights(init: str, k: int) -> None:
    weights = with_outliers()
    book = cluster(weights, k, init)
    assert len(book.values) == k
    assert book.codes.unique().tolist() == list(range(1, k + 1))
    # Random may have left no cluster empty, and found a slightly different optimum.
    assert error(weights, book) <= 1.0001 * error(weights, cluster(weights, k, "density"))


@pytest.mark.parametrize("init", INITS)
def test_a_gap_around_zero_leaves_no_cluster_without_weights(init: str) -> None:
    """The smallest weights are pruned, so values between -t and t would serve no weight."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(200_000, generator=generator)
    pruned = weights * (weights.abs() > 1.65)
    book = cluster(pruned, 16, init)
    assert len(book.values) == 16
    if init == "linear":
        best = error(pruned, cluster(pruned, 16, "density"))
        assert error(pruned, book) <= (1 + 1e-9) * best


@given(
    st.lists(st.integers(-1000, 1000).filter(bool), min_size=2, max_size=60),
    st.integers(1, 20),
    st.sampled_from(sorted(INITS)),
)
def test_every_cluster_has_weights(values: list[int], k: int, init: str) -> None:
    weights = torch.tensor(values, dtype=torch.float64)
    book = cluster(weights, k, init)
    assert len(book.values) == min(k, len(set(values)))
    assert book.codes.unique().tolist() == list(range(1, len(book.values) + 1))


def test_clusters_that_all_have_weights_are_left_as_they_are(monkeypatch) -> None:
    def split(*args: object) -> None:
        raise AssertionError("a cluster was moved")

    monkeypatch.setattr(codebooks, "_split", split)
    torch.manual_seed(0)
    weights = torch.randn(20_000)
    for rate in (0.0, 0.05):
        for k in (2, 16, 32):
            cluster(weights, k, "linear", rate)
    with pytest.raises(AssertionError, match="was moved"):
        cluster(with_outliers(), 16)


def test_with_a_price_of_bits_clusters_are_moved_only_at_the_start() -> None:
    weights = with_outliers()
    rate = 0.02
    book = cluster(weights, 16, "linear", rate)
    assert 8 <= len(book.values) <= 16  # a rare cluster may still vanish
    best = cluster(weights, 16, "density", rate)
    costs = []
    for found in (book, best):
        p = found.codes.flatten().bincount()[1:].double() / weights.numel()
        bits = float(-(p[p > 0] * p[p > 0].log2()).sum())
        costs.append(error(weights, found) / weights.numel() / float(weights.var()) + rate * bits)
    assert costs[0] <= 1.01 * costs[1]


def test_cells_of_one_value_are_not_split() -> None:
    ordered = np.array([1.0, 1.0, 1.0, 2.0, 2.0])
    edges = np.array([0, 5])
    assert codebooks._split(ordered, edges, 1).tolist() == [0, 3, 5]
    assert codebooks._split(ordered, edges, 4).tolist() == [0, 3, 5]  # there is no other cut
    near = np.array([1.0, np.nextafter(1.0, 2)])  # their mean rounds to one of them
    assert codebooks._split(near, np.array([0, 2]), 1).tolist() == [0, 1, 2]
