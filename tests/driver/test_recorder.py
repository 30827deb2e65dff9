"""What the driver reads from the record of a run."""

import time

from trainer.config import Config, to_dataclass
from trainer.driver.recorder import Recorder
from trainer.messages import HeadLost, HeadRecovered
from trainer.report.terminal import Console
from trainer.store.directory import RunDirectory


def test_the_head_is_lost_for_long_from_its_deadline_until_it_recovers(tmp_path):
    needed = {"name": "n", "model": {}, "data": {"batch_size": 8}, "optimizer": {}, "phases": {}}
    cfg = to_dataclass(Config, needed)
    record = Recorder(cfg, RunDirectory(tmp_path), Console.quiet(), None)
    assert not record.head_lost_for_long
    record.on(HeadLost("10.0.0.5:6379", time.monotonic() + 1000))
    assert not record.head_lost_for_long
    record.on(HeadLost("10.0.0.5:6379", time.monotonic() - 1))
    assert record.head_lost_for_long
    record.on(HeadRecovered("10.0.0.5:6379"))
    assert not record.head_lost_for_long
    record.close()
