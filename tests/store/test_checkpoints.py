"""The checkpoints of a run: the one from which a resumed run continues."""

import errno
import threading

import pytest
import torch

from trainer.errors import RunError
from trainer.store.checkpoints import Checkpoints
from trainer.store.serialization import pack, to_bytes, unpack

NAMES = ["train", "prune", "retrain"]


@pytest.fixture
def store(tmp_path):
    opened = Checkpoints(tmp_path, keep=2)
    yield opened
    opened.close()


def weights(value):
    return to_bytes({"w": torch.tensor([float(value)])})


def state(value):
    return pack({"value": value})


def latest(store, names=NAMES):
    said = []
    store.wait()
    return store.latest(names, said.append), said


def keep(store, phase, name, *steps):
    """States within a phase, each of them written."""
    for step in steps:
        store.save_within(phase, name, step, state(step))
        store.wait()


def damage(store, file):
    path = store.folder / file
    path.write_bytes(path.read_bytes()[:-3])


def files(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_an_empty_run_begins(store):
    point, said = latest(store)
    assert (point.phase, point.step, point.weights, point.checkpoint) == (0, 0, None, None)
    assert (point.records, said) == ([], [])


def test_the_furthest_point_wins_and_old_steps_go(store):
    keep(store, 0, "train", 5, 10, 15)
    point, _ = latest(store)
    assert (point.phase, point.step, point.weights) == (0, 15, None)
    assert unpack(point.checkpoint) == {"value": 15}
    assert len(list(store.folder.iterdir())) == 2
    store.save_phase_end(0, {"name": "train", "steps": 20}, weights(1))
    point, _ = latest(store)
    assert (point.phase, point.step, point.checkpoint) == (1, 0, None)
    assert point.records == [{"name": "train", "steps": 20}]
    assert [path.name for path in store.folder.iterdir()] == ["01-train.safetensors"]
    store.save_within(1, "prune", 3, state(3))
    point, _ = latest(store)
    assert (point.phase, point.step) == (1, 3)
    assert point.weights is not None


def test_a_finished_run_has_nothing_left_to_do(store):
    for phase, name in enumerate(NAMES):
        store.save_phase_end(phase, {"name": name}, weights(phase))
    point, _ = latest(store)
    assert (point.phase, [r["name"] for r in point.records]) == (3, NAMES)


@pytest.mark.parametrize("hurt", [lambda b: b[:-3], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(store, hurt):
    keep(store, 0, "train", 5, 10)
    path = store.folder / "01-train-step-00000010.safetensors"
    path.write_bytes(hurt(path.read_bytes()))
    point, said = latest(store)
    assert point.step == 5
    assert len(said) == 1
    assert path.name in said[0]
    assert f"renamed to {path.name}.damaged" in said[0]
    assert latest(store)[1] == []  # not again


def test_a_half_written_one_does_not_count_and_goes(store):
    store.save_within(0, "train", 5, state(5))
    store.wait()
    part = store.folder / "01-train-step-00000010.safetensors.part"
    part.write_bytes(b"half")
    assert latest(store)[0].step == 5
    assert not part.exists()


def test_a_folder_that_cannot_be_written_is_reported_and_its_files_are_kept(store):
    store.save_within(0, "train", 5, state(5))
    store.wait()
    moved = store.folder.rename(store.folder.with_name("away"))
    store.folder.write_text("a file in the way")
    store.save_within(0, "train", 10, state(10))
    with pytest.raises(RunError, match="a checkpoint cannot be written"):
        store.wait()
    assert [path.name for path in moved.iterdir()] == ["01-train-step-00000005.safetensors"]


def test_the_newest_is_damaged_and_there_is_no_other(tmp_path):
    """What is written after the restart counts from a lower step on, and must stay."""
    store = Checkpoints(tmp_path, keep=1)
    keep(store, 0, "train", 100)
    damage(store, "01-train-step-00000100.safetensors")
    point, _ = latest(store)
    assert (point.step, point.checkpoint) == (0, None)
    for step in (60, 70):
        keep(store, 0, "train", step)
        assert latest(store)[0].step == step
    assert files(store) == [
        "01-train-step-00000070.safetensors",
        "01-train-step-00000100.safetensors.damaged",
    ]
    store.close()


def test_a_damaged_end_of_a_phase_takes_later_phases_along(store):
    keep(store, 0, "train", 5)
    store.save_phase_end(0, {"name": "train"}, weights(1))
    store.save_phase_end(1, {"name": "prune"}, weights(2))
    keep(store, 2, "retrain", 7, 8)
    damage(store, "01-train.safetensors")
    point, said = latest(store)
    assert (point.phase, point.step, point.weights, len(said)) == (0, 0, None, 1)
    keep(store, 0, "train", 5)
    assert files(store) == ["01-train-step-00000005.safetensors", "01-train.safetensors.damaged"]
    assert latest(store)[0].step == 5


def test_an_unreadable_file_is_reported_and_nothing_is_changed(store, monkeypatch):
    """A file system that is away for a moment says nothing of what the file holds."""
    store.save_phase_end(0, {"name": "train"}, weights(1))
    store.save_phase_end(1, {"name": "prune"}, weights(2))
    store.wait()
    before = files(store)

    def stale(path):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("trainer.store.checkpoints.read_checksummed", stale)
        with pytest.raises(RunError, match=r"cannot be read: .*Stale file handle: .*01-train"):
            latest(store)
    assert files(store) == before
    assert latest(store)[0].phase == 2


@pytest.mark.parametrize("name", ["two-step-train", "a-step-00000001", "train[1]*", "x.y"])
def test_a_phase_may_have_any_name(store, name):
    names = [name, "a"]
    keep(store, 0, name, 1, 2, 3)
    assert len(files(store)) == 2
    store.save_phase_end(0, {"name": name}, weights(1))
    store.wait()
    assert files(store) == [f"01-{name}.safetensors"]
    keep(store, 1, "a", 4)
    point, said = latest(store, names)
    assert (point.phase, point.step, said) == (1, 4, [])


def test_steps_of_one_phase_leave_those_of_others_alone(store):
    """A phase that ended before a crash may still have some; `latest` lets them go."""
    keep(store, 1, "prune", 900)
    keep(store, 0, "train", 1, 2, 3)
    assert "02-prune-step-00000900.safetensors" in files(store)
    assert latest(store)[0].phase == 0
    assert len(files(store)) == 2
    store.save_phase_end(0, {"name": "train"}, weights(1))
    keep(store, 0, "train", 3)
    assert latest(store)[0].phase == 1
    assert files(store) == ["01-train.safetensors"]


def test_a_slow_disk_delays_no_caller_and_loses_no_end_of_a_phase(store, monkeypatch):
    begun, go_on, written = threading.Event(), threading.Event(), []

    def slow(file):
        begun.set()
        assert go_on.wait(10)
        written.append(file.name)

    monkeypatch.setattr(store, "_write_now", slow)
    store.save_within(0, "train", 1, b"")
    assert begun.wait(10)
    for step in (2, 3, 4):  # the disk is busy with the first
        store.save_within(0, "train", step, b"")
    store.save_phase_end(0, {"name": "train"}, b"")
    for step in (1, 2):
        store.save_within(1, "prune", step, b"")
    store.save_phase_end(1, {"name": "prune"}, b"")
    store.save_within(2, "retrain", 1, b"")
    go_on.set()
    store.wait()
    assert written == [
        "01-train-step-00000001.safetensors",
        "01-train.safetensors",
        "02-prune.safetensors",
        "03-retrain-step-00000001.safetensors",
    ]


def test_what_the_driver_says_of_the_run_comes_back(store):
    store.save_within(0, "train", 5, state(5), {"seconds": 7.5})
    assert latest(store)[0].progress == {"seconds": 7.5}
    store.save_phase_end(0, {"name": "train"}, weights(1), {"seconds": 9.0})
    assert latest(store)[0].progress == {"seconds": 9.0}
    keep(store, 1, "prune", 1)  # by a version that did not say
    assert latest(store)[0].progress == {}
