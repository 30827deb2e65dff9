"""First phases that trials share: kept, taken, and mended."""

from trainer.sweeps.shared_phases import SharedPhases


def test_what_a_trial_had_to_make_anew_takes_the_place_of_what_was_damaged(tmp_path):
    shared = SharedPhases("train", tmp_path)
    for content in ("damaged", "whole"):
        made = tmp_path / content / "checkpoints"
        made.mkdir(parents=True)
        (made / "01-train.safetensors").write_text(content)
        shared.give("key", made)
    assert shared.ready("key")
    taken = tmp_path / "trial" / "checkpoints"
    shared.take("key", taken)
    assert (taken / "01-train.safetensors").read_text() == "whole"
    assert [path.name for path in (tmp_path / "prefixes").iterdir()] == ["key"]
