"""Messages about refused arguments suggest correct ones."""

import pytest

from trainer.config.compose import compose_config
from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "sed: there is no such setting; did you mean seed?"),
        ("lr=1", "lr: there is no such setting; did you mean optimizer.lr?"),
        (
            "phases.prun.sparsity=0.5",
            "phases.prun.sparsity: there is no such setting; did you mean phases.prune.sparsity?",
        ),
        (
            "model.depth=3",
            "model.depth: there is no such setting; model has classes; +model.depth=... passes a "
            "further argument",
        ),
        (
            "limits.speed=1",
            "limits.speed: there is no such setting; limits has max_accuracy_drop, ",
        ),
        (
            "limits={max_accuracy_dropp: 0.01}",
            "limits.max_accuracy_dropp: there is no such setting; did you mean limits.max_acc",
        ),
        (
            "phases.train.lr=1",
            "phases.train.lr: there is no such setting; did you mean phases.train.fit.lr?",
        ),
        (
            "phases.train.fit.warmup=1",
            "phases.train.fit.warmup: there is no such setting; did you mean phases.train.fit.warm",
        ),
        (
            "phases.quantize.bits=8",
            "phases.quantize.bits: there is no such setting; the phases of this experiment are "
            "train, prune, retrain, share; +phase@phases.quantize=KIND adds one at the end",
        ),
        ("sweep.trial=5", "sweep.trial: there is no such setting; did you mean sweep.trials?"),
        ("data={trein: 5}", "data.trein: there is no such setting; did you mean data.train?"),
        ("bogus=3", "bogus: there is no such setting; --help lists the settings"),
        ("seed=1,2", "seed=1,2: these are several values; write seed=[1,2] for a list, "),
        ("smoke", "smoke: it is not of the form key=value; an experiment is +experiment=NAME"),
        ("dotcor", "dotcor: it is not of the form key=value; did you mean doctor? an experiment"),
        ("resume", "resume: it is not of the form key=value; did you mean resume=RUN_DIR? an exp"),
        ("modle=lenet5", "modle: there is no such setting; did you mean model?"),
        ("+experiment=qat", "experiment is chosen twice: write +experiment=NAME once"),
        ("a=b=c", "a=b=c: it cannot be read (mismatched input '='); put a text with special"),
        (
            "model=lenet",
            "model/lenet: there is no such file; did you mean lenet5? there are alexnet",
        ),
        ("data=images", "data.root is missing: set data.root=..."),
        ("logger=[csv,wand]", "logger/wand: there is no such file; did you mean wandb? there are"),
    ],
)
@pytest.mark.slow
def test_advice(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose_config(["+experiment=smoke", override]).plain()
    assert str(error.value).startswith(message)


def test_an_experiment_is_added() -> None:
    with pytest.raises(ConfigError, match=r"^experiment=\.\.\.: .* write \+experiment=\.\.\."):
        compose_config(["experiment=qat"])


@pytest.mark.parametrize("overrides", [[], ["seed=1"]])
def test_without_an_experiment(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"^name is missing: choose an experiment with \+exp"):
        compose_config(overrides)


def test_a_users_file_replaces_a_shipped_one_but_never_the_defaults(tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "resnet18.yaml").write_text("_target_: mine.ResNet18\n")
    (tmp_path / "config.yaml").write_text("seed: 99\n")
    plain = compose_config(["+experiment=smoke", "model=resnet18"], str(tmp_path)).plain()
    assert plain["model"] == {"_target_": "mine.ResNet18"}
    assert plain["seed"] == 0
    assert plain["phases"]["prune"]["sparsity"] == 0.9
