"""Reading ahead by a thread."""

import threading
import time

import pytest
import torch

from trainer.data import prefetch
from trainer.data import split as splits
from trainer.data.prefetch import generator_states, prefetched
from trainer.data.split import TensorSplit


def test_items_come_in_order_and_errors_after_them():
    def items():
        yield from range(5)
        raise OSError("gone")

    found = prefetched(items())
    assert [next(found) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(OSError, match="gone"):
        next(found)
    assert list(prefetched(iter(()))) == []


def test_closing_ends_the_thread_and_the_items():
    ended = threading.Event()

    def items():
        try:
            yield from range(1000)
        finally:
            ended.set()

    source = items()
    found = prefetched(source)
    assert next(found) == 0
    found.close()
    source.close()
    assert ended.is_set()
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_only_a_few_items_are_made_ahead():
    made = []
    found = prefetched((made.append(n) or n for n in range(100)), depth=2)
    next(found)
    time.sleep(0.1)
    assert len(made) <= 4
    found.close()


@pytest.mark.parametrize("draws", [False, True])
def test_splits_in_memory_are_read_ahead_unless_they_draw_random_numbers(monkeypatch, draws):
    names = []

    def augment(inputs, indices, epoch):
        names.append(threading.current_thread().name)
        return inputs + torch.rand(1) if draws else inputs + epoch

    split = TensorSplit(torch.arange(20.0), torch.zeros(20, dtype=torch.int64), augment)
    order = torch.arange(20).split(5)
    monkeypatch.setattr(splits, "_PREFETCH_S", 0.0)
    monkeypatch.setattr(splits, "spare_cpus", lambda: 1)
    torch.manual_seed(0)
    ahead = [x for x, _ in split.batches(order, 3)]
    assert names[1] == ("MainThread" if draws else "prefetch")
    monkeypatch.setattr(splits, "spare_cpus", lambda: 0)
    torch.manual_seed(0)
    assert torch.equal(torch.cat(ahead), torch.cat([x for x, _ in split.batches(order, 3)]))


def test_states_of_generators_are_compared(monkeypatch):
    states = generator_states()
    assert generator_states() == states
    torch.rand(1)
    assert generator_states() != states
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert prefetch.spare_cpus() == 2
