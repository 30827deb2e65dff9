"""Files whose layers are coded by a class of the user's own."""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trainer
from trainer import ConfigError, RunError, artifact
from trainer.artifact.__main__ import main
from trainer.artifact.container import join, split
from trainer.compress.coding import decode_layer, encode_layer, max_positions
from trainer.experiment import Experiment, check_model, encode_artifact
from trainer.phases import Prune, Train
from trainer.store.serialization import to_bytes


class Zip:
    def __init__(self, level: int = 9) -> None:
        self.level = level

    def encode(self, levels: Any, clusters: int, negatives: int) -> Any:
        return zlib.compress(levels.tobytes(), self.level)

    def decode(self, blob: bytes, shape: Any, clusters: int, negatives: int) -> Any:
        return np.frombuffer(zlib.decompress(blob), np.uint16).reshape(shape)


class Other(Zip):
    pass


PATH = f"{__name__}.Zip"


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    sparse = torch.randn(20, 30) * (torch.rand(20, 30) < 0.2)
    return {
        "conv.weight": torch.tensor([0.0, -1.0, 0.5, 2.0])[torch.randint(0, 4, (6, 3, 3, 3))],
        "conv.bias": torch.randn(6).half().float(),
        "fc.weight": sparse,
        "dense.weight": torch.randn(7, 5),
        "tied.weight": sparse,
    }


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return list(found) == list(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_every_tensor_comes_back_and_the_header_names_the_class(tmp_path: Path) -> None:
    content = artifact.encode(weights(), coder=Zip(), about={"name": "x"})
    assert split(content)[0]["coder"] == PATH
    assert same(artifact.loads(content, coder=Zip(1)), weights())
    assert artifact.read_about(content) == {"name": "x"}
    described = artifact.describe(content, coder=Zip())
    assert sum(layer["bytes"] for layer in described.layers) + described.frame == len(content)
    (tmp_path / "model.dcz").write_bytes(content)
    assert same(artifact.load(tmp_path / "model.dcz", coder=Zip()), weights())


def test_a_file_of_shipped_coders_needs_and_names_no_coder() -> None:
    content = artifact.encode(weights())
    assert "coder" not in split(content)[0]
    assert same(artifact.loads(content, coder=Zip()), weights())


def test_code_that_a_file_names_is_never_imported(capsys, tmp_path: Path) -> None:
    content = artifact.encode(weights(), coder=Zip())
    with pytest.raises(artifact.ArtifactError, match=f"by the class '{PATH}', and none was given"):
        artifact.loads(content)
    with pytest.raises(artifact.ArtifactError, match=f"and {__name__}.Other was given; pass an ob"):
        artifact.describe(content, coder=Other())
    header, sections = split(content)
    del header["coder"]
    with pytest.raises(artifact.ArtifactError, match="coder of the writer's own is needed"):
        artifact.loads(join(header, [bytes(s) for s in sections]), coder=Zip())
    for wrong in (7, ["x"], {"_target_": "os.system"}):
        forged = join({**header, "coder": wrong}, [bytes(s) for s in sections])
        with pytest.raises(artifact.ArtifactError, match="wrong about the coder"):
            artifact.loads(forged, coder=Zip())
    (tmp_path / "model.dcz").write_bytes(
        join({**header, "coder": "\x1b[31mred"}, [bytes(s) for s in sections])
    )
    assert main(["verify", str(tmp_path / "model.dcz")]) == 1
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1000, 1000), (3,), ()])
def test_any_size_is_justified_by_the_bytes(shape: tuple[int, ...]) -> None:
    class Nothing(Zip):
        def encode(self, levels, clusters, negatives):
            return b""

        def decode(self, blob, shape, clusters, negatives):
            return np.zeros(shape, np.int64)

    levels = np.zeros(shape, np.uint16)
    blob = encode_layer(levels, shape, 3, coder=Nothing())
    assert levels.size <= max_positions(len(blob))
    assert len(blob) < 60
    found = decode_layer(blob, shape, 3, coder=Nothing())
    assert found.dtype == np.uint16
    assert np.array_equal(found, levels)


def raising(*args: Any) -> Any:
    raise KeyError("oh no")


@pytest.mark.parametrize(
    ("method", "does", "problem"),
    [
        ("encode", raising, "Zip.encode raised KeyError: 'oh no'"),
        ("encode", lambda *args: "text", "Zip.encode returned a str, not bytes"),
        ("decode", raising, "Zip.decode raised KeyError: 'oh no'"),
        ("decode", lambda *args: [1], "Zip.decode returned no array of integers"),
        ("decode", lambda *args: np.zeros(162), "returned no array of integers"),
        ("decode", lambda *args: np.zeros(162, int), r"returned the shape \(162,\), not \(6, 3, 3"),
        ("decode", lambda *args: np.full((6, 3, 3, 3), 9), "levels that are not from 0 to 6"),
        ("decode", lambda *args: np.full((6, 3, 3, 3), -1), "levels that are not from 0 to 6"),
        ("decode", lambda *args: np.zeros((6, 3, 3, 3), int), "returned other levels than Zip.enc"),
    ],
)
def test_a_broken_coder_fails_when_it_writes_and_names_the_tensor(
    method: str, does: Any, problem: str
) -> None:
    coder = Zip()
    setattr(coder, method, does)
    with pytest.raises(ValueError, match=f"^conv.weight: .*{problem}"):
        artifact.encode(weights(), coder=coder)


def test_a_coder_cannot_change_what_it_is_given() -> None:
    class Changes(Zip):
        def encode(self, levels, clusters, negatives):
            levels[...] = 0
            return super().encode(levels, clusters, negatives)

    with pytest.raises(ValueError, match="raised ValueError: assignment destination is read-only"):
        artifact.encode(weights(), coder=Changes())


def test_damage_ends_in_one_kind_of_error() -> None:
    levels = np.eye(20, dtype=np.uint16)
    blob = encode_layer(levels, levels.shape, 2, coder=Zip())
    for wrong in [blob[:n] for n in range(len(blob))] + [blob + b"\1"]:
        with pytest.raises(ValueError, match=r"bytes|number|damaged|raised|positions"):
            decode_layer(wrong, levels.shape, 2, coder=Zip())
    assert np.array_equal(decode_layer(blob + b"\0", levels.shape, 2, coder=Zip()), levels)


def test_the_command_takes_a_class(tmp_path: Path, capsys) -> None:
    file = tmp_path / "model.dcz"
    file.write_bytes(artifact.encode(weights(), coder=Zip()))
    assert main(["verify", str(file), f"--coder={PATH}"]) == 0
    assert main(["verify", str(file), f"--coder={__name__}.Nothing"]) == 2
    assert "--coder._target_=" in capsys.readouterr().err


def settings(**artifact_settings: Any) -> dict[str, Any]:
    inputs = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    return {
        "model": nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)),
        "data": ((inputs, inputs.argmax(1)),) * 3,
        "phases": [Train(epochs=1), Prune(0.5)],
        "cluster": {"backend": "inline", "workers": 1, "threads": 1},
        "artifact": {"make": True, **artifact_settings},
    }


@pytest.mark.parametrize("coder", [Zip(), {"_target_": PATH, "level": 1}])
@pytest.mark.usefixtures("elsewhere")
@pytest.mark.slow
def test_a_run_writes_and_evaluates_such_a_file(coder: Any) -> None:
    result = trainer.run(**settings(coder=coder), out="run", progress=False)
    assert result.artifact is not None
    assert split(result.artifact.read_bytes())[0]["coder"] == PATH
    assert result.metrics["accuracy"] == result.summary["accuracy"]
    loaded = trainer.load("run", settings()["model"], coder=Zip())
    for name, value in result.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    again = settings() | {"phases": [Prune(0.6)], "init_from": str(result.artifact)}
    with pytest.raises(ConfigError, match=f"init_from=.*coded by the class '{PATH}'"):
        trainer.run(**again, out="again", progress=False)


def test_a_coder_that_never_works_is_refused_before_training() -> None:
    class Broken(Zip):
        def decode(self, blob, shape, clusters, negatives):
            return super().decode(blob[1:], shape, clusters, negatives)

    with pytest.raises(ConfigError, match=r"artifact.coder: Broken.decode raised error: Error -3"):
        check_model(Experiment(**settings(coder=Broken())))
    with pytest.raises(ConfigError, match=r"artifact.coder: object.encode raised AttributeError"):
        check_model(Experiment(**settings(coder={"_target_": "builtins.object"})))
    for wrong in ("zip", None, 3):
        with pytest.raises(ConfigError, match=r"artifact.coder=.*: it must be one of auto"):
            Experiment(**settings(coder=wrong))


def test_a_coder_that_fails_later_ends_in_one_line() -> None:
    class Small(Zip):
        def encode(self, levels, clusters, negatives):
            if levels.size > 100:
                raise OverflowError("too large")
            return super().encode(levels, clusters, negatives)

    experiment = Experiment(**settings(coder=Small()))
    check_model(experiment)
    large = to_bytes({"weight": torch.eye(20)})
    with pytest.raises(RunError, match=r"model.dcz cannot be written: weight: Small.encode raised"):
        encode_artifact(experiment, large)
