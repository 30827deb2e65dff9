"""Communication with Ray actors: arguments to them, and the streams of their messages."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RaySystemError, RayTaskError

from trainer.cluster.group import Failure
from trainer.errors import ConfigError, RunError, first_line

END = object()
"""The value that `receive` returns at the end of a stream."""


@contextlib.contextmanager
def startup_errors() -> Iterator[None]:
    """Convert Ray's errors at the start of workers to a RunError."""
    try:
        yield
    except RayError as error:
        last = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise RunError(f"the workers did not start: {last}", str(error)) from error


def put(value: Any) -> Any:
    """Store a value for the workers. Raises ConfigError if it cannot be pickled."""
    try:
        return ray.put(value)
    except RayError:
        raise
    except Exception as error:
        cause = first_line(error.__cause__ or error)
        raise ConfigError(
            f"a {type(value).__name__} cannot be sent to the workers: {cause}; "
            "make it picklable, or set cluster.backend=inline"
        ) from error


def died(answer: Any) -> bool:
    """Whether an actor died before it could answer."""
    try:
        ray.get(answer)
    except RayActorError:
        return True
    return False


def ready(streams: Mapping[Any, int], timeout: float) -> list[Any]:
    """A stream that has a message, after waiting for the first one.

    The message is then on this host, so that `receive` never waits for a lost host.
    """
    found, _ = ray.wait(list(streams), timeout=timeout)
    return found


def all_ready(streams: Collection[Any], timeout: float) -> list[Any]:
    """As `ready`, but all streams that have a message."""
    found, rest = ray.wait(list(streams), timeout=timeout)
    if found and rest:
        found += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
    return found


def receive(stream: Any) -> Any:
    """The next message of a stream: a Failure if the worker died, END at the end."""
    try:
        return ray.get(next(stream))
    except StopIteration:
        return END
    except RayActorError as error:
        return Failure("the process died", str(error), has_died=True, has_left=error.preempted)
    except RayTaskError as error:
        return _transfer_failure(error)
    except RayError as error:  # such as a message that was lost with its host
        return Failure(type(error).__name__, str(error), has_died=True)


def _transfer_failure(error: RayTaskError) -> Failure:
    """The failure of a worker to load an argument or to send a message.

    Exceptions of the function itself arrive as messages, so nothing else raises RayTaskError.
    """
    if not isinstance(error.cause, RaySystemError):
        return Failure(f"a message cannot be sent: {error.cause}", str(error), is_permanent=True)
    cause = first_line(error.cause).removeprefix("System error: ")
    reason = f"an argument cannot be loaded: {cause}"
    if "No module named" in cause:
        reason += "; cluster.working_dir or cluster.py_modules sends your code to the workers"
    return Failure(reason, str(error), is_permanent=True)
