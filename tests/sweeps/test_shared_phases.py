"""Phases that trials share: stored, loaded, and replaced if they are damaged."""

import dataclasses
from types import SimpleNamespace

import trainer
from trainer.experiment import Experiment
from trainer.sweeps.shared_phases import SharedPhases


def test_phases_that_were_trained_again_replace_damaged_ones(tmp_path):
    shared = SharedPhases("train", tmp_path)
    for content in ("damaged", "whole"):
        made = tmp_path / content / "checkpoints"
        made.mkdir(parents=True)
        (made / "01-train.safetensors").write_text(content)
        shared.save("key", made)
    assert shared.ready("key")
    taken = tmp_path / "trial" / "checkpoints"
    shared.load("key", taken)
    assert (taken / "01-train.safetensors").read_text() == "whole"
    assert [path.name for path in (tmp_path / "shared_phases").iterdir()] == ["key"]


def test_only_what_the_weights_depend_on_is_part_of_the_key(tmp_path):
    made = trainer.compose("lenet300")
    cfg, shared = made.config, SharedPhases("train", tmp_path)

    def key_of(**change):
        config = dataclasses.replace(cfg, **change)
        return shared.key(SimpleNamespace(config=config, phases=made.phases))

    key = shared.key(made)
    others = (
        {"seed": cfg.seed + 1},
        {"init_from": "a.pt", "init_skip": ["fc3*"]},
        {"task": {"_target_": "mine.Task"}},
        {"cluster": dataclasses.replace(cfg.cluster, workers=cfg.cluster.workers + 1)},
    )
    for change in others:
        assert key_of(**change) != key, change
    same = (
        {"name": "other"},
        {"cluster": dataclasses.replace(cfg.cluster, max_restarts=9)},
    )
    for change in same:
        assert key_of(**change) == key, change


def test_a_search_within_a_share_of_the_limit_depends_on_the_limit_and_on_later_phases(tmp_path):
    def key(name, *settings):
        composed = trainer.compose(
            "deep_compression_lenet300", "limits.max_accuracy_drop=0.01", *settings
        )
        plain = composed.settings()
        del plain["phases"]["share"]["max_drop"]  # null by default
        return SharedPhases(name, tmp_path).key(Experiment.from_config(plain))

    search = ("phases.share.bits=auto", "limits.max_accuracy_drop=0.02")
    assert key("retrain") == key("retrain", *search)
    assert key("share", search[0]) != key("share", *search)
    assert key("share", *search) == key("share", *search)
