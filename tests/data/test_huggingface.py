"""data=huggingface: local data sets; without the library, what is checked before it is needed."""

import json
import sys

import pytest
import torch

from trainer.data.collate import Pad
from trainer.data.huggingface import huggingface

ROWS = [{"ids": list(range(1, 2 + i % 3)), "mask": [1] * (1 + i % 3), "label": i % 2} for i in
        range(20)]  # fmt: skip


def read(split, epoch=None):
    return next(iter(split.batches([torch.arange(len(split))], epoch)))


@pytest.fixture
def files(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return {"path": "json", "data_files": str(path)}


def test_columns_become_inputs_by_keyword_and_lists_are_padded(files):
    splits = huggingface(**files, inputs=["ids", "mask"], target="label", collate=Pad())
    assert [len(split) for split in vars(splits).values()] == [16, 2, 2]
    inputs, targets = read(splits.train)
    assert inputs["ids"].shape == inputs["mask"].shape == (16, 3)
    assert inputs["ids"].dtype == targets.dtype == torch.int64


def test_a_saved_data_set_with_a_transform(files, tmp_path):
    import datasets

    tables = datasets.load_dataset("json", data_files=files["data_files"])
    tables["test"] = tables["train"].select(range(5))
    tables.save_to_disk(str(tmp_path / "saved"))
    splits = huggingface(
        str(tmp_path / "saved"),
        transform=lambda row: (torch.tensor([float(len(row["ids"]))]), row["label"]),
        loader_workers=0,
    )
    assert [len(split) for split in vars(splits).values()] == [18, 2, 5]
    inputs, targets = read(splits.test)
    assert inputs.flatten().tolist() == [1, 2, 3, 1, 2]
    assert targets.tolist() == [0, 1, 0, 1, 0]


def test_what_is_refused(files):
    for settings, said in (
        ({"inputs": "words", "target": "label"}, "has no column 'words'; it has ids, mask, label"),
        ({"inputs": "ids", "target": "label", "test": "later"}, "has no split 'later'; it has tr"),
    ):
        with pytest.raises(ValueError, match=said):
            huggingface(**files, **settings)
    with pytest.raises(ValueError, match="cannot be loaded"):
        huggingface("nowhere", inputs="ids", target="label")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install .\.\[huggingface\]"):
        huggingface("json", inputs="ids", target="label")
    with pytest.raises(ValueError, match="give the columns inputs and target, or a transform"):
        huggingface("json", inputs="ids")
