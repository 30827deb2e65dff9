"""Phases that trials share: stored, loaded, and replaced if they are damaged."""

import dataclasses

import trainer
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
    cfg = trainer.compose("lenet300").config
    shared = SharedPhases("train", tmp_path)
    key = shared.key(cfg)
    others = (
        {"seed": cfg.seed + 1},
        {"init_from": "a.pt", "init_skip": ["fc3*"]},
        {"task": {"_target_": "mine.Task"}},
        {"cluster": dataclasses.replace(cfg.cluster, workers=cfg.cluster.workers + 1)},
    )
    for change in others:
        assert shared.key(dataclasses.replace(cfg, **change)) != key, change
    same = (
        {"name": "other"},
        {"cluster": dataclasses.replace(cfg.cluster, max_restarts=9)},
    )
    for change in same:
        assert shared.key(dataclasses.replace(cfg, **change)) == key, change


def test_a_search_within_a_share_of_the_limit_depends_on_the_limit_and_on_later_phases(tmp_path):
    def key(name, *settings):
        composed = trainer.compose(
            "deep_compression_lenet300", "limits.max_accuracy_drop=0.01", *settings
        )
        return SharedPhases(name, tmp_path).key(composed.config)

    search = ("phases.share.bits=auto", "limits.max_accuracy_drop=0.02")
    assert key("retrain") == key("retrain", *search)
    assert key("share", search[0]) != key("share", *search)
    assert key("share", *search) == key("share", *search)
