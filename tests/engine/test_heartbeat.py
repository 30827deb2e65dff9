"""The heartbeat of a rank: beats, and busy blocks without beats."""

from trainer.engine.heartbeat import Heartbeat


def test_a_rank_is_busy_until_its_last_busy_block_ends():
    """Blocks nest, and the thread that reduces gradients opens blocks of its own."""
    heartbeat = Heartbeat()
    outer, inner = heartbeat.busy(), heartbeat.busy()
    with outer:
        with heartbeat.busy():
            pass
        assert heartbeat.is_busy
        inner.__enter__()
    assert heartbeat.is_busy
    inner.__exit__(None, None, None)
    assert not heartbeat.is_busy


def test_only_the_first_batch_may_take_long():
    heartbeat = Heartbeat()
    waiting = []

    def batches():
        for number in range(3):
            waiting.append(heartbeat.is_busy)
            yield number

    assert list(heartbeat.busy_until_first(batches())) == [0, 1, 2]
    assert waiting == [True, False, False]
    assert list(heartbeat.busy_until_first(iter(()))) == []


def test_in_a_watched_block_the_busy_blocks_around_it_do_not_count():
    heartbeat = Heartbeat()
    with heartbeat.busy():
        with heartbeat.watched():
            assert not heartbeat.is_busy
            with heartbeat.busy():
                assert heartbeat.is_busy
            assert not heartbeat.is_busy
        assert heartbeat.is_busy
    assert not heartbeat.is_busy
