"""Selection by magnitude compared with sorting, and the sparsity ramp at known points."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.compress.masks import cubic_sparsity, kept_counts, largest
from trainer.errors import Diverged

few_values = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -3e38, 7.25])
values = st.lists(st.one_of(few_values, st.floats(-100, 100, width=16)), min_size=1, max_size=60)


def sorted_mask(weight: Tensor, keep: int) -> Tensor:
    """The same by sorting everything: stable, so that the lowest index wins among equals."""
    order = weight.abs().flatten().sort(descending=True, stable=True).indices[:keep]
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[order] = True
    return mask.view(weight.shape)


@settings(max_examples=80, deadline=None)
@given(values, st.floats(0, 1), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_largest_is_what_sorting_gives(
    numbers: list[float], density: float, dtype: torch.dtype
) -> None:
    weight = torch.tensor(numbers, dtype=torch.float64).clamp(-6e4, 6e4).to(dtype)
    keep = round(density * len(numbers))
    mask = largest(weight, keep)
    assert int(mask.sum()) == keep
    assert torch.equal(mask, sorted_mask(weight, keep))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_over_several_pieces(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("trainer.compress.masks._PIECE", 100)
    weight = torch.randn(47, 31).to(dtype)
    for keep in (0, 1, 99, 100, 101, 700, 47 * 31):
        assert torch.equal(largest(weight, keep), sorted_mask(weight, keep))


def test_largest_does_not_depend_on_the_memory_format() -> None:
    weight = torch.randint(-3, 4, (6, 4, 3, 3)).float()
    other = weight.to(memory_format=torch.channels_last)
    mask = largest(other, 50)
    assert torch.equal(mask, largest(weight, 50))
    assert mask.stride() == other.stride()


def test_largest_refuses() -> None:
    with pytest.raises(ValueError, match="cannot keep 5 of 4"):
        largest(torch.ones(4), 5)
    for bad in (torch.inf, torch.nan, -torch.nan):
        with pytest.raises(Diverged, match="diverged"):
            largest(torch.tensor([1.0, bad, 2.0]), 1)


def greedy_share(weights: list[Tensor], keep: int, floors: list[int]) -> list[int]:
    """The same by sorting: fill the floors, then take the largest of the rest."""
    counts = list(floors)
    rest = []
    for owner, (weight, floor) in enumerate(zip(weights, floors, strict=True)):
        ranked = weight.abs().flatten().sort(descending=True).values.tolist()
        rest += [(-magnitude, owner) for magnitude in ranked[floor:]]
    for _, owner in sorted(rest)[: keep - sum(floors)]:
        counts[owner] += 1
    return counts


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_share_is_what_sorting_gives(data: st.DataObject) -> None:
    weights = [torch.tensor(v) for v in data.draw(st.lists(values, min_size=1, max_size=4))]
    floors = [data.draw(st.integers(0, len(weight))) for weight in weights]
    keep = data.draw(st.integers(sum(floors), sum(len(weight) for weight in weights)))
    counts = kept_counts(weights, keep, floors)
    assert sum(counts) == keep
    assert counts == greedy_share(weights, keep, floors)


def test_share_gives_each_layer_its_floor() -> None:
    small, large = torch.rand(10) * 1e-3, torch.rand(90) + 1
    assert kept_counts([small, large], 20, [0, 0]) == [0, 20]
    assert kept_counts([small, large], 20, [3, 9]) == [3, 17]


def test_share_compares_types_by_value() -> None:
    weights = [torch.tensor([1.0, 4.0]).half(), torch.tensor([2.0, 3.0], dtype=torch.float64)]
    assert kept_counts(weights, 3, [0, 0]) == [1, 2]


def test_share_refuses() -> None:
    with pytest.raises(ValueError, match="floors alone keep 4 weights, more than 3"):
        kept_counts([torch.ones(4), torch.ones(4)], 3, [2, 2])
    with pytest.raises(Diverged, match="diverged"):
        kept_counts([torch.ones(4), torch.full((4,), torch.nan)], 3, [0, 0])


def test_cubic_sparsity() -> None:
    ramp = [cubic_sparsity(p / 10, 0.2, 0.8, 0.1, 0.5) for p in range(11)]
    assert ramp[0] == ramp[1] == pytest.approx(0.2)
    assert ramp[3] == pytest.approx(0.8 - 0.6 / 8)  # half of the way leaves an eighth
    assert ramp[5:] == pytest.approx([0.8] * 6)
    assert ramp == sorted(ramp)
    assert cubic_sparsity(0.5, 0.2, 0.8, 0.1, 0.5) == 0.8
