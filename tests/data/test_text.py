"""Text: ids of a fixed number of characters, windows, and parts that do not overlap."""

from pathlib import Path

import pytest
import torch

from trainer.data.characters import alphabet, encode, text
from trainer.data.split import TensorSplit


def test_alphabet_holds_the_most_frequent_characters() -> None:
    assert alphabet("abcabca", 2) == "ab"
    assert alphabet("bbaacd", 3) == "abc"  # of the equally frequent c and d, the lower one
    assert alphabet("a", 5) == "a"


def test_encode_maps_rare_characters_to_zero() -> None:
    assert encode("ab\u00fc\U0001f600a", "a\u00fc").tolist() == [1, 0, 2, 0, 1]


def test_python_reference_has_a_fixed_vocabulary() -> None:
    splits = text(context=64, vocabulary=96)
    assert isinstance(splits.train, TensorSplit)
    ids = splits.train.inputs
    assert ids.dtype == torch.int64
    assert ids.shape[1] == 64
    assert int(ids.min()) >= 0
    assert int(ids.max()) <= 95
    assert (ids == 0).float().mean() < 0.001
    assert len(splits.train) > 5000
    assert len(splits.train) > 15 * len(splits.validation) > 0
    assert len(splits.test) > 300


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text("".join(chr(0x4E00 + i % 50) for i in range(1000)), encoding="utf-8")
    return path


def test_targets_are_the_next_characters_and_parts_follow_one_another(file: Path) -> None:
    splits = text(context=10, vocabulary=51, path=str(file))
    starts = {"train": 0, "validation": 900, "test": 950}
    for name, start in starts.items():
        split = getattr(splits, name)
        n = ((900 if name == "train" else 50) - 1) // 10
        assert len(split) == n
        expected = (torch.arange(start, start + n * 10 + 1) % 50) + 1
        assert torch.equal(split.inputs.flatten(), expected[:-1])
        assert torch.equal(split.targets.flatten(), expected[1:])


def test_every_run_gets_the_same_text() -> None:
    first, second = text().train, text().train
    assert isinstance(first, TensorSplit)
    assert isinstance(second, TensorSplit)
    assert torch.equal(first.inputs, second.inputs)


def test_refuses_what_cannot_work(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.context=0"):
        text(context=0)
    with pytest.raises(ValueError, match=r"data.vocabulary=1"):
        text(vocabulary=1)
    with pytest.raises(
        ValueError,
        match=r"validation part holds 50 characters, but data.context=50 needs at least 51",
    ):
        text(context=50, path=str(file))
    with pytest.raises(ValueError, match=r"data.path=.*none.txt: there is no such file"):
        text(path=str(tmp_path / "none.txt"))
    latin = tmp_path / "latin1.txt"
    latin.write_bytes("caf\u00e9 au lait".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin1.txt: it must be UTF-8"):
        text(path=str(latin))
