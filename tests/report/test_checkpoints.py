"""The checkpoints of a run: which one a resumed run goes on from."""

import pytest
import torch

from trainer.engine.checkpoint import pack, to_bytes, unpack
from trainer.errors import RunError
from trainer.report.checkpoints import Checkpoints

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


def latest(store):
    said = []
    store.wait()
    return store.latest(NAMES, said.append), said


def test_an_empty_run_begins(store):
    point, said = latest(store)
    assert (point.phase, point.step, point.weights, point.within) == (0, 0, None, None)
    assert (point.records, said) == ([], [])


def test_the_furthest_point_wins_and_old_steps_go(store):
    for step in (5, 10, 15):
        store.within_phase(0, "train", step, state(step))
    point, _ = latest(store)
    assert (point.phase, point.step, point.weights) == (0, 15, None)
    assert unpack(point.within) == {"value": 15}
    assert len(list(store.folder.iterdir())) == 2
    store.phase_ended(0, {"name": "train", "steps": 20}, weights(1))
    point, _ = latest(store)
    assert (point.phase, point.step, point.within) == (1, 0, None)
    assert point.records == [{"name": "train", "steps": 20}]
    assert [path.name for path in store.folder.iterdir()] == ["01-train.safetensors"]
    store.within_phase(1, "prune", 3, state(3))
    point, _ = latest(store)
    assert (point.phase, point.step) == (1, 3)
    assert point.weights is not None


def test_a_finished_run_has_nothing_left_to_do(store):
    for phase, name in enumerate(NAMES):
        store.phase_ended(phase, {"name": name}, weights(phase))
    point, _ = latest(store)
    assert (point.phase, [r["name"] for r in point.records]) == (3, NAMES)


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_checkpoint_is_said_and_the_one_before_it_used(store, damage):
    store.within_phase(0, "train", 5, state(5))
    store.within_phase(0, "train", 10, state(10))
    store.wait()
    path = store.folder / "01-train-step-00000010.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    point, said = latest(store)
    assert point.step == 5
    assert len(said) == 1
    assert path.name in said[0]


def test_a_half_written_one_does_not_count_and_goes(store):
    store.within_phase(0, "train", 5, state(5))
    store.wait()
    part = store.folder / "01-train-step-00000010.safetensors.part"
    part.write_bytes(b"half")
    assert latest(store)[0].step == 5
    assert not part.exists()


def test_a_folder_that_cannot_be_written_is_told_and_what_is_there_stays(store):
    store.within_phase(0, "train", 5, state(5))
    store.wait()
    moved = store.folder.rename(store.folder.with_name("away"))
    store.folder.write_text("a file in the way")
    store.within_phase(0, "train", 10, state(10))
    with pytest.raises(RunError, match="a checkpoint cannot be written"):
        store.wait()
    assert [path.name for path in moved.iterdir()] == ["01-train-step-00000005.safetensors"]
