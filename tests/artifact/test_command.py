"""python -m trainer.artifact: output, files and exit codes."""

import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from trainer import artifact
from trainer.artifact import __main__ as command
from trainer.artifact.__main__ import main


@pytest.fixture
def model() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tied = torch.randn(12, 20)
    return {
        "conv.weight": torch.randn(6, 3, 3, 3) * (torch.rand(6, 3, 3, 3) < 0.4),
        "conv.bias": torch.randn(6).half().float(),
        "encoder.weight": tied,
        "decoder.weight": tied,
        "fc.weight": torch.tensor([0.0, 1.0, 2.0, 3.0])[torch.arange(60) % 4].view(6, 10),
    }


def test_show_verify_and_decode(model, tmp_path, capsys) -> None:
    file, out = tmp_path / "model.dcz", tmp_path / "out.safetensors"
    file.write_bytes(artifact.encode(model, about={"name": "tiny"}))
    assert main(["show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "name: tiny" in shown
    assert "6 x 3 x 3 x 3" in shown
    (row,) = [line for line in shown.splitlines() if "fc.weight" in line]
    assert [cell.strip() for cell in row.split("│")][6] == "3"  # distinct values but zero
    assert main(["verify", str(file)]) == 0
    assert f"whole, {len(model)} tensors, {file.stat().st_size:,} bytes" in capsys.readouterr().out
    assert main(["decode", str(file), str(out)]) == 0
    loaded = load_file(out)
    assert loaded.keys() == model.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.dcz", "out.safetensors"]


def test_names_are_shown_as_they_are(tmp_path, capsys) -> None:
    file = tmp_path / "[bold].dcz"
    file.write_bytes(artifact.encode({"a[/b]": torch.ones(2)}, about={"x": "[/y]"}))
    assert main(["show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "a[/b]" in shown
    assert "x: [/y]" in shown


@pytest.mark.parametrize("verb", ["show", "verify", "decode"])
def test_a_damaged_or_missing_file_ends_in_one_line(verb, model, tmp_path, capsys) -> None:
    file = tmp_path / "model.dcz"
    arguments = [verb, str(file), *([str(tmp_path / "out")] if verb == "decode" else [])]
    for content, told in ((None, "No such file"), (artifact.encode(model)[:-1], "truncated")):
        if content is not None:
            file.write_bytes(content)
        assert main(arguments) == 1
        shown, said = capsys.readouterr()
        assert shown == ""
        assert said.startswith(str(file))
        assert told in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written(model, tmp_path, capsys) -> None:
    file = tmp_path / "model.dcz"
    file.write_bytes(artifact.encode(model))
    out = tmp_path / "no" / "out.safetensors"
    assert main(["decode", str(file), str(out)]) == 1
    assert capsys.readouterr().err == f"{out}: No such file or directory\n"


@pytest.mark.parametrize("arguments", [[], ["unpack", "x"], ["decode", "x"]])
def test_wrong_arguments_exit_2(arguments, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: python -m trainer.artifact" in capsys.readouterr().err


def test_the_module_is_the_command(tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "model.dcz").write_bytes(b"nonsense")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["artifact", "verify", "model.dcz"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command.__file__, run_name="__main__")
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said == "model.dcz: this is not a .dcz file: it does not begin with DCZ\n"


def test_long_names_are_shown_in_full_and_all_bytes(model, tmp_path, capsys) -> None:
    file = tmp_path / "model.dcz"
    name = "encoder.layers.11.attention.self.query_key_value.projection.low_rank.weight" * 3
    file.write_bytes(artifact.encode({name: torch.randn(512, 4, 3, 3), **model}))
    assert main(["show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert name in shown
    assert "512 x 4 x 3 x 3" in shown
    assert f" {artifact.describe(file.read_bytes()).frame} " in shown


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path, capsys) -> None:
    file = tmp_path / "model.dcz"
    evil = "\x1b[2J\x1b]0;title\x07\u202e\n"
    weights = {evil: torch.ones(3), "equal": torch.ones(3)}
    file.write_bytes(artifact.encode(weights, about={evil: evil, "name": "caf\u00e9 :smile:"}))
    assert main(["show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert not set("\x1b\x07\u202e") & set(shown)
    assert "\\x1b[2J\\x1b]0;title\\x07\\u202e\\n" in shown
    assert "caf\u00e9 :smile:" in shown


def test_a_name_that_safetensors_keeps_for_itself(tmp_path, capsys) -> None:
    file, out = tmp_path / "model.dcz", tmp_path / "out.safetensors"
    file.write_bytes(artifact.encode({"__metadata__": torch.ones(2)}))
    assert main(["decode", str(file), str(out)]) == 1
    assert "a tensor is named __metadata__" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("verb", ["show", "verify", "decode"])
def test_the_limit_can_be_set(verb, tmp_path, capsys) -> None:
    file = tmp_path / "model.dcz"
    file.write_bytes(artifact.encode({"w": torch.ones(9)}))
    arguments = [verb, str(file), *([str(tmp_path / "out")] if verb == "decode" else [])]
    assert main([*arguments, "--max-bytes=35"]) == 1
    assert "36 bytes, and 35 are allowed" in capsys.readouterr().err
    assert main([*arguments, "--max-bytes=36"]) == 0
    assert capsys.readouterr().err == ""


def test_the_old_name_of_the_limit_works_and_prints_the_new_one(tmp_path, capsys) -> None:
    file = tmp_path / "model.dcz"
    file.write_bytes(artifact.encode({"w": torch.ones(9)}))
    assert main(["verify", str(file), "--most-bytes=36"]) == 0
    assert capsys.readouterr().err == "--most-bytes is now called --max-bytes\n"
    assert main(["verify", str(file), "--most-bytes=35"]) == 1
    with pytest.raises(SystemExit):
        main(["verify", "--help"])
    assert "--most-bytes" not in capsys.readouterr().out
