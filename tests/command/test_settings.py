"""Help on settings: every key of every shipped experiment is explained."""

from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.command.settings import choices, settings
from trainer.config.comments import file_comment, key_comments
from trainer.version import __version__

# Keys whose value is chosen as a whole, by the name of a group's file.
CHOSEN = {"precision"}


@pytest.mark.parametrize("name", sorted(choices()["experiment"]))
@pytest.mark.slow
def test_every_setting_of_every_experiment_is_explained(name: str) -> None:
    found = settings([f"+experiment={name}"])
    given = ("sweep.params.", "sweep.trial_overrides.", "sweep.lengths.", "sweep.conditions.")
    missing = [
        s.key
        for s in found
        if not (s.comment or s.key.endswith("._target_") or s.key in CHOSEN)
        and not s.key.startswith((*given, "sweep.objectives.", "sweep.constraints."))
        and ".overrides." not in s.key
        and ".clusters." not in s.key
    ]
    assert missing == []


@pytest.mark.parametrize("group", sorted(choices()))
def test_every_choice_of_a_group_says_what_it_is(group: str) -> None:
    for name, file in choices()[group].items():
        assert len(file_comment(file)) > 3, name


def test_comments_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "# What this is,\n# on two lines\n_target_: a.B\n"
        'first: "a # no comment"  # and a comment: of\n        # two lines\n'
        "section:   # of a section\n  second: [1, 2] # with # inside\n  - item\n"
        'third: it\'s#here\nfourth: "#"   # said\n'
    )
    assert file_comment(file) == "What this is, on two lines"
    assert key_comments(file) == {
        "first": "and a comment: of two lines",
        "section": "of a section",
        "section.second": "with # inside",
        "fourth": "said",
    }


def test_the_files_of_a_user_are_explained_too(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# Mine\n_target_: my.Net\nwidth: 8  # units\n")
    (tmp_path / "experiment" / "own.yaml").write_text(
        "# @package _global_\n# My own\ndefaults:\n  - override /model: mine\n  - _self_\n"
        "name: own\nmodel:\n  width: 9  # units of mine\n"
    )
    found = {s.key: s for s in settings(["+experiment=own"], str(tmp_path))}
    assert (found["model.width"].value, found["model.width"].comment) == (9, "units of mine")
    assert found["seed"].comment.startswith("seeds initial weights")


def test_help_explains_groups_or_the_settings_of_an_experiment(capsys) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "usage: trainer [+experiment=NAME]" in out
    assert "precision  bf16, fp16, fp32" in out
    assert main(["+experiment=smoke", "phases.prune.sparsity=0.8", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("phases.prune.sparsity=0.8")
    assert lines[at + 1].startswith("    fraction of the weights that become zero")
    assert main(["+experiment=nonsense", "--help"]) == 2


def test_version_and_list(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"trainer {__version__}\n"
    assert main(["--list"]) == 0
    assert "smoke " in capsys.readouterr().out


def test_inspecting_a_file_is_the_command_of_the_artifact(capsys) -> None:
    assert main(["artifact", "show", "nowhere.dcz"]) == 1
    assert "nowhere.dcz: No such file" in capsys.readouterr().err


def test_costs_are_the_command_of_the_hardware(capsys) -> None:
    assert main(["hardware", "nowhere.dcz"]) in (1, 2)
    assert "nowhere.dcz" in capsys.readouterr().err
