"""Lets the workers of a group connect with one another, and collects why some could not."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from trainer.cluster.group import Failure
from trainer.cluster.rank import Rank

START_MARGIN_S = 5.0  # how long an answer may take to arrive, in addition to what it waits for
FAILED_WAIT_S = 2.0  # how long to wait for further failures after a rank could not connect


def request_connect(
    ranks: Sequence[Rank],
    host: str | None,
    device: str,
    timeout_s: float,
    wait_s: float,
    keep: bool,
) -> list[Any]:
    """Let workers form a new group. Returns the pending answers of all ranks.

    Args:
        ranks: the workers by their rank in the group.
        host: the address on which rank 0 listens; None: that of its node.
        device: cpu or cuda.
        timeout_s: how long they may take, in seconds.
        wait_s: how long a rank waits for the others in a collective later, in seconds.
        keep: whether the group may continue from a state that the first worker keeps.

    Raises:
        RayError: rank 0 does not answer.
    """
    rendezvous = ray.get(ranks[0].actor.listen.remote(host), timeout=timeout_s + START_MARGIN_S)
    return [
        rank.actor.connect.remote(number, len(ranks), *rendezvous, device, timeout_s, wait_s, keep)
        for number, rank in enumerate(ranks)
    ]


def wait_connected(
    pending: Sequence[Any], timeout_s: float
) -> tuple[list[int], dict[int, Failure], list[int]]:
    """Wait until all workers are connected, or for a moment after one could not connect.

    Args:
        pending: the answers of `request_connect`.
        timeout_s: as there.

    Returns:
        The ranks that died, the failures of others, and the ranks that have not answered.
    """
    lost, failures = [], {}
    waiting = {ref: number for number, ref in enumerate(pending)}
    deadline = time.monotonic() + timeout_s + START_MARGIN_S
    while waiting:
        found, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not found:
            break
        number = waiting.pop(found[0])
        try:
            failure: Failure | None = ray.get(found[0])
        except RayError:
            lost.append(number)
        else:
            if failure is None:
                continue
            failures[number] = failure
        deadline = min(deadline, time.monotonic() + FAILED_WAIT_S)
    return lost, failures, [*waiting.values()]


def broken_links(
    ranks: Sequence[Rank],
    failures: Mapping[int, Failure],
    find_silent: Callable[[Collection[int]], Collection[int]],
) -> dict[frozenset[str], str]:
    """The pairs of hosts that cannot reach each other, by Ray's ids -> what is wrong, in words.

    Args:
        ranks: the workers.
        failures: why ranks could not connect.
        find_silent: returns those of some ranks that do not answer at all: their links say nothing.
    """
    pairs = [
        (rank, failure.lost_rank)
        for rank, failure in failures.items()
        if failure.lost_rank is not None and failure.is_unreachable
    ]
    silent = set(find_silent({rank for pair in pairs for rank in pair}))
    links = {}
    for pair in pairs:
        one, other = (ranks[rank] for rank in pair)
        if silent.isdisjoint(pair) and one.node_id != other.node_id:
            text = f"{one.node} cannot reach {other.node}"
            links[frozenset((one.node_id, other.node_id))] = text
    return links
