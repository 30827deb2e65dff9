"""data=table: encoding of columns, parts, and refused files."""

import csv

import pytest
import torch

from trainer.data.table import table

ROWS = [
    {"id": f"r{i}", "age": i, "city": ["rome", "oslo", "bern"][i % 3], "floor": i % 2, "sold": "no"}
    for i in range(20)
]
for row in ROWS[::4]:
    row["sold"] = "yes"


def write(path, rows, delimiter=","):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def changed(row, **values):
    rows = [dict(r) for r in ROWS]
    rows[row] |= values
    return rows


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "a.csv", ROWS)


FEATURES = ["age", "city", "floor"]


def test_columns_become_inputs(path):
    splits = table(path, "sold", validation=path, test=path, features=FEATURES)
    train = splits.train
    assert train.inputs.shape == (20, 5)
    ages = torch.arange(20.0)
    expected = (ages - ages.mean()) / ages.std(correction=0)
    torch.testing.assert_close(train.inputs[:, 0], expected)
    assert train.inputs[:3, 1:4].tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]  # bern, oslo, rome
    assert train.inputs[:2, 4].tolist() == [-1, 1]
    assert train.targets.tolist() == [1, 0, 0, 0] * 5
    assert torch.equal(splits.test.inputs, train.inputs)
    as_categories = table(path, "sold", features=FEATURES, categorical=["floor"])
    assert as_categories.train.inputs.shape[1] == 6


def test_statistics_are_those_of_the_training_rows(path, tmp_path):
    splits = table(path, "sold", features=["age"], hold_out=0.2)
    assert [len(split) for split in vars(splits).values()] == [12, 4, 4]
    torch.testing.assert_close(splits.train.inputs.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    later = write(tmp_path / "b.csv", changed(0, city="paris", age=100))
    test = table(path, "sold", test=later, validation=path, features=FEATURES).test
    assert test.inputs[0, 1:4].tolist() == [0, 0, 0]
    assert test.inputs[0, 0] > 10


def test_regression_and_whole_numbers_as_classes(path):
    prices = table(path, "age", features=["city"], regression=True, validation=path, test=path)
    assert torch.equal(prices.train.targets, torch.arange(20.0))
    floors = table(path, "floor", features=["city"], validation=path, test=path)
    assert floors.train.targets.tolist() == [0, 1] * 10


def test_missing_values(tmp_path):
    path = write(tmp_path / "a.csv", changed(3, age="NA", city=""))
    with pytest.raises(ValueError, match=r"a\.csv, row 4, column 'age': the value is missing"):
        table(path, "sold", features=FEATURES, validation=path, test=path)
    splits = table(path, "sold", features=FEATURES, validation=path, test=path, missing="mean")
    assert splits.train.inputs[3, :4].tolist() == [0, 0, 0, 0]
    with pytest.raises(ValueError, match=r"row 4, column 'city': the target is missing"):
        table(path, "city", validation=path, test=path, features=["floor"])


def test_other_separators_and_marks_of_utf8(tmp_path):
    for name, separator in (("a.tsv", "\t"), ("a.csv", ";")):
        path = tmp_path / name
        write(path, ROWS, separator)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        options = {"separator": ";"} if name == "a.csv" else {}
        assert table(str(path), "sold", features=FEATURES, **options).train.inputs.shape[1] == 5


def test_parquet(path, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    one = table(path, "sold", features=FEATURES)
    two = table(str(tmp_path / "a.parquet"), "sold", features=FEATURES)
    assert torch.equal(one.train.inputs, two.train.inputs)
    assert torch.equal(one.test.targets, two.test.targets)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": "price"}, r"has no column 'price'; it has id, age, city, floor, sold"),
        ({"features": ["rooms"]}, r"has no column 'rooms'"),
        ({"features": ["age", "sold"]}, "'sold' is data.target"),
        ({"categorical": ["rooms"]}, "'rooms' is not one of the features"),
        ({"missing": "drop"}, "data.missing=drop: it must be error or mean"),
        ({"separator": ";"}, r"has no column 'sold'"),
        ({"test": "no.csv"}, r"no\.csv cannot be read"),
        ({"test": "a.xls"}, r"a\.xls cannot be read: it must be a \.csv"),
        ({"hold_out": 0.6}, r"data\.hold_out=0\.6"),
    ],
)
def test_wrong_settings(path, options, said):
    with pytest.raises(ValueError, match=said):
        table(**{"path": path, "target": "sold", **options})


def test_wrong_files(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n1,2,3\n")
    with pytest.raises(ValueError, match="line 3 has 3 values for 2 columns"):
        table(str(path), "a")
    path.write_text("a,b\n")
    with pytest.raises(ValueError, match="has no rows"):
        table(str(path), "a")
    numbers = write(tmp_path / "b.csv", ROWS)
    other = write(tmp_path / "c.csv", changed(2, age="many"))
    with pytest.raises(ValueError, match=r"c\.csv, row 3, column 'age': 'many' is not a finite"):
        table(numbers, "sold", test=other, features=FEATURES)
    other = write(tmp_path / "d.csv", changed(2, sold="perhaps"))
    with pytest.raises(ValueError, match="the target is 'perhaps', not a class of the training"):
        table(numbers, "sold", test=other, features=FEATURES)
