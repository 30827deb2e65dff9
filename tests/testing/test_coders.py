"""The contract suite of coders accepts the shipped ones and finds errors in others."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trainer
from trainer import artifact
from trainer.artifact.__main__ import main as command
from trainer.compress.coding.layer import CODERS
from trainer.experiment import Experiment
from trainer.models import LeNet300
from trainer.testing import check_coder

PAGE = (Path(__file__).parents[2] / "docs" / "own-coder.md").read_text()
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("name", CODERS)
def test_shipped_coders_keep_the_contract(name: str) -> None:
    check_coder(CODERS[name])


class Raw:
    """Two bytes for each level."""

    def encode(self, levels: Any, clusters: int, negatives: int) -> Any:
        return levels.tobytes()

    def decode(self, blob: bytes, shape: Any, clusters: int, negatives: int) -> Any:
        return np.frombuffer(blob, np.uint16).reshape(shape)


class OneByte(Raw):
    """Suffices for 255 clusters."""

    def encode(self, levels, clusters, negatives):
        return levels.astype(np.uint8).tobytes()

    def decode(self, blob, shape, clusters, negatives):
        return np.frombuffer(blob, np.uint8).reshape(shape)


class Rows(Raw):
    """Takes no vectors."""

    def encode(self, levels, clusters, negatives):
        return b"".join(row.tobytes() for row in levels)


class NoBytes(Raw):
    def encode(self, levels, clusters, negatives):
        return bytearray(levels.tobytes())


class Changes(Raw):
    def encode(self, levels, clusters, negatives):
        levels[...] = np.minimum(levels, 9)
        return levels.tobytes()


class Counts(Raw):
    calls = 0

    def encode(self, levels, clusters, negatives):
        self.calls += 1
        return levels.tobytes() + bytes([self.calls % 251])

    def decode(self, blob, shape, clusters, negatives):
        return super().decode(blob[:-1], shape, clusters, negatives)


class Remembers(Raw):
    def encode(self, levels, clusters, negatives):
        self.levels = levels
        return b"x"

    def decode(self, blob, shape, clusters, negatives):
        return self.levels


class Flat(Raw):
    def decode(self, blob, shape, clusters, negatives):
        return np.frombuffer(blob, np.uint16)


class Floats(Raw):
    def decode(self, blob, shape, clusters, negatives):
        return super().decode(blob, shape, clusters, negatives).astype(float)


class Lists(Raw):
    def decode(self, blob, shape, clusters, negatives):
        return super().decode(blob, shape, clusters, negatives).tolist()


class Signs(Raw):
    """Forgets the last cluster where all are negative."""

    def encode(self, levels, clusters, negatives):
        return np.minimum(levels, max(1, clusters - (negatives == clusters))).tobytes()


class NoPickle(Raw):
    def __init__(self) -> None:
        self.levels = (level for level in range(3))


def test_a_coder_that_keeps_the_contract() -> None:
    check_coder(Raw())


@pytest.mark.parametrize(
    ("coder", "found"),
    [
        (OneByte(), "65535 clusters .* 34 of 45 levels are other ones after decode"),
        (Rows(), r"a layer of shape \(\) .*: encode raised TypeError: iteration over a 0-d array"),
        (NoBytes(), "encode returned a bytearray, not bytes"),
        (Changes(), "encode changed the levels"),
        (Counts(), "encode returned other bytes than before"),
        (Remembers(), "decode returned the shape|levels are other ones"),
        (Flat(), r"shape \(9, 5\) .*decode returned the shape \(45,\)"),
        (Floats(), "decode returned float64, not integers"),
        (Lists(), "decode returned a list, not a NumPy array"),
        (Signs(), "levels are other ones after decode"),
        (NoPickle(), "the coder cannot be pickled"),
    ],
)
def test_a_broken_coder_is_found(coder: Any, found: str) -> None:
    with pytest.raises(AssertionError, match=found):
        check_coder(coder)


def test_the_code_of_the_page_works(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    source, read, check = PYTHON.findall(PAGE)
    Path("packed.py").write_text(source)
    exec(check, {})
    settings = {"_target_": "packed.Lzma", "preset": 3}
    experiment = Experiment(
        model=LeNet300,
        data=trainer.data.mnist,
        phases=[trainer.phases.Train()],
        artifact={"make": True, "coder": settings},
    )
    assert Experiment.from_config(experiment.settings()).coder.preset == 3
    content = artifact.encode(
        {"weight": torch.eye(20)}, coder=Experiment.from_config(experiment.settings()).coder
    )
    Path("model.dcz").write_bytes(content)
    variables: dict[str, Any] = {}
    exec(read.partition("model = ")[0], variables)
    assert torch.equal(variables["state_dict"]["weight"], torch.eye(20))
    assert command(["show", "model.dcz", "--coder=packed.Lzma"]) == 0
    assert "weight" in capsys.readouterr().out
    assert command(["show", "model.dcz"]) == 1
    assert "coded by the class 'packed.Lzma', and none was given" in capsys.readouterr().err
