"""Shifts: moved pixel for pixel, by draws that depend on seed, epoch and sample alone."""

import pytest
import torch

from trainer.data.augment import shift
from trainer.data.hashing import mix


def moved_by_hand(image: torch.Tensor, dy: int, dx: int) -> torch.Tensor:
    result = torch.zeros_like(image)
    _, height, width = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - dy < height and 0 <= x - dx < width:
                result[:, y, x] = image[:, y - dy, x - dx]
    return result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_every_image_is_moved_by_its_own_draw(dtype: torch.dtype) -> None:
    images = torch.arange(1, 6 * 2 * 4 * 5 + 1).reshape(6, 2, 4, 5).to(dtype)
    indices = torch.tensor([3, 0, 11, 59_999, 7, 3])
    found = shift(images, indices, 4, seed=9, pixels=2)
    assert found.dtype == dtype
    for image, index, result in zip(images, indices.tolist(), found, strict=True):
        # A window that starts lower in the padded image shows its content higher up.
        top, left = divmod(mix(9, 4, index) % 25, 5)
        assert torch.equal(result, moved_by_hand(image, 2 - top, 2 - left))


def test_all_moves_are_about_equally_likely() -> None:
    n = 9000
    points = torch.zeros(n, 1, 3, 3)
    points[:, 0, 1, 1] = 1
    counts = shift(points, torch.arange(n), 0, seed=0, pixels=1).sum(0).flatten()
    # 1,000 expected each, standard deviation 30: five of them leave no room for chance.
    assert (counts - 1000).abs().max() < 150


def test_does_not_depend_on_how_a_batch_is_sharded() -> None:
    images = torch.rand(7, 1, 28, 28)
    indices = torch.randperm(60_000)[:7]
    whole = shift(images, indices, 2, seed=1, pixels=2)
    parts = [
        shift(i, k, 2, seed=1, pixels=2)
        for i, k in zip(images.split(3), indices.split(3), strict=True)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_changes_with_seed_and_epoch() -> None:
    images, indices = torch.rand(50, 1, 8, 8), torch.arange(50)
    first = shift(images, indices, 0, seed=0, pixels=2)
    assert not torch.equal(shift(images, indices, 1, seed=0, pixels=2), first)
    assert not torch.equal(shift(images, indices, 0, seed=1, pixels=2), first)


def test_empty_batch_and_no_shift() -> None:
    empty, none = torch.zeros(0, 1, 28, 28), torch.zeros(0, dtype=torch.int64)
    assert shift(empty, none, 0, seed=0, pixels=2).shape == empty.shape
    images = torch.rand(3, 1, 28, 28)
    assert torch.equal(shift(images, torch.arange(3), 0, seed=0, pixels=0), images)


def test_images_in_another_memory_format_move_alike() -> None:
    images, indices = torch.rand(5, 3, 8, 8), torch.arange(5)
    expected = shift(images, indices, 0, seed=0, pixels=1)
    other = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(shift(other, indices, 0, seed=0, pixels=1), expected)
