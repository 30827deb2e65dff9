"""Settings of a sweep on the command line, with Hydra and the shipped experiments."""

import pytest
import yaml
from omegaconf import OmegaConf

from trainer.__main__ import main
from trainer.config.compose import compose_config
from trainer.config.overrides import as_hydra


def composed(capsys, *arguments):
    assert main(["+experiment=convnet_sweep", *arguments, "--cfg"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("sweep.params.model.depth=range(1,3)", "range(1,3)"),
        ("+sweep.params.model.depth=range(1,3)", "range(1,3)"),
        ('sweep.params.model.depth="range(1,3)"', "range(1,3)"),
        ("sweep.params.model.depth=3,5", "3,5"),
        ("sweep.params.model.depth=null", None),
        ("sweep.params={model.depth: 'range(1,3)'}", "range(1,3)"),
    ],
)
@pytest.mark.slow
def test_a_range_on_the_command_line_takes_the_place_of_the_experiments(capsys, argument, said):
    params = composed(capsys, argument)["sweep"]["params"]
    assert params["model.depth"] == said
    assert "model" not in params
    assert params["model.kernel_size"] == "choice(3,5,7)"


def test_other_keys_with_dots_do_too(capsys):
    found = composed(capsys, "sweep.trial_overrides.data.train=50")["sweep"]["trial_overrides"]
    assert found == {"data.train": 50, "phases.train.fit.epochs": 4}
    text = "sweep.params.phases.share.overrides.conv*=range(3,8)"
    assert as_hydra(text) == "++sweep.params={phases.share.overrides.conv*: 'range(3,8)'}"


@pytest.mark.parametrize(
    ("argument", "section"),
    [
        ("phases.train.fit.freeze={conv1: 4}", "phases.train.fit.freeze"),
        ("phases.share.overrides.fc1=3", "phases.share.overrides"),
        ("phases.share.clusters={fc1: 5}", "phases.share.clusters"),
        ("optimizer.groups.plain={kind: vectors}", "optimizer.groups"),
        ("optimizer.groups.plain.lr_factor=0.1", "optimizer.groups"),
    ],
)
def test_a_mapping_with_free_keys_takes_new_ones_without_a_plus(argument, section):
    before = OmegaConf.select(compose_config(["+experiment=smoke"]).tree, section) or {}
    plain, added = (
        OmegaConf.select(compose_config(["+experiment=smoke", plus + argument]).tree, section)
        for plus in ("", "++")
    )
    assert plain == added
    assert len(plain) == len(before) + 1


def test_a_key_that_a_file_has_nested_is_replaced_too(capsys, tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    (folder / "nested.yaml").write_text(
        "# @package _global_\ndefaults: [convnet_sweep, _self_]\n"
        "sweep: {params: {data: {shift: 'choice(0,1)', batch_size: 'choice(32,64)'}}}\n"
    )
    argument = "sweep.params.data.shift=choice(2,3)"
    assert main([
        "--config-dir", str(tmp_path), "+experiment=nested", argument, "--cfg"
    ]) == 0  # fmt: skip
    params = yaml.safe_load(capsys.readouterr().out)["sweep"]["params"]
    assert params["data.shift"] == "choice(2,3)"
    assert params["data"] == {"batch_size": "choice(32,64)"}


def test_an_objective_can_be_taken_away(capsys):
    for arguments in (
        ["sweep.objectives={accuracy: null, loss: minimize}"],
        ["sweep.objectives.accuracy=null", "sweep.objectives.loss=minimize"],
    ):
        found = composed(capsys, *arguments)["sweep"]["objectives"]
        assert found == {"accuracy": None, "loss": "minimize"}


def test_a_mapping_of_ranges_that_are_not_in_quotes_is_explained(capsys):
    argument = "sweep.params={optimizer.lr: 'choice(1,2)', model: {depth: range(1,3)}}"
    assert main(["+experiment=convnet_sweep", argument]) == 2
    said = capsys.readouterr().err
    assert "put the range of model.depth in quotes" in said
    assert "sweep.params.model.depth=range(1,5)" in said
