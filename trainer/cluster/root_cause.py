"""Finds why a run on a group ended: the first failure that arrives may only be a consequence."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.cluster.group import Failure
from trainer.cluster.nodes import lost_nodes
from trainer.cluster.streams import END, ready, receive

GOING_WAIT_S = 0.3  # how long a lost host may accept connections after its first process died


@dataclass(frozen=True)
class RootCause:
    """The failure that ended a run, and what arrived while it was looked for."""

    rank: int  # of the worker that failed, or was lost first
    failure: Failure  # why the run ended; of a rank that lost this worker if it reports nothing
    reported: Failure | None  # the failure that the worker, or Ray, has reported; None: neither has
    failures: dict[int, Failure]  # all that arrived, by rank
    late: list[Any]  # messages of rank 0 that arrived meanwhile


def find_root_cause(
    rank: int, failure: Failure, streams: Mapping[Any, int], wait_s: float
) -> RootCause:
    """Find the cause of the first failure.

    If it only says that a peer was lost, wait briefly for the failure of the peer.

    Args:
        rank: of the worker that failed.
        failure: its failure.
        streams: of the messages that are still to come -> rank.
        wait_s: how long to wait, in seconds.
    """
    late = []
    deadline = time.monotonic() + wait_s
    failures = {rank: failure}
    waiting = {stream: r for stream, r in streams.items() if r != rank}
    while waiting:
        left = max(0, deadline - time.monotonic()) if failure.is_peer_loss else 0
        found = ready(waiting, left)
        for stream in found:
            message = receive(stream)
            if message is END:
                del waiting[stream]
            elif not isinstance(message, Failure):
                late.append(message)
            else:
                other = waiting.pop(stream)
                failures[other] = message
                if failure.is_peer_loss and not message.is_peer_loss:
                    rank, failure = other, message
        if not found:
            break
    # Name the worker that was lost first: it lost no other one, and others lost it.
    rest = dict(failures)
    while rank in rest and (lost := rest[rank].lost_rank) is not None:
        failure = rest.pop(rank)
        rank = lost
    return RootCause(rank, failure, failures.get(rank), failures, late)


def host_is_gone(node_id: str) -> bool:
    """Whether the host of a worker that was lost has left the cluster, or is about to.

    A process may be seen to die some milliseconds before its host stops accepting connections, so
    that a host that still does is asked again.
    """
    if lost_nodes([node_id]):
        return True
    time.sleep(GOING_WAIT_S)
    return bool(lost_nodes([node_id]))
