"""The file objects.pkl of a run: Python objects to which its configuration refers.

A pickle executes code when it is read, so it is read only by `trainer.resume`, which the user calls
on a folder of their own.
"""

import io
from collections.abc import Mapping
from typing import Any

import cloudpickle

from trainer.errors import ConfigError, first_line

MAX_BYTES = 256 << 20


class _TooLargeError(Exception):
    pass


class _LimitedFile(io.BytesIO):
    """A file in memory that refuses to grow beyond `MAX_BYTES`."""

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > MAX_BYTES:
            raise _TooLargeError
        return super().write(data)


def dump_objects(objects: Mapping[str, Any]) -> tuple[bytes | None, str]:
    """Pickle the objects of an experiment; classes of `__main__` or a notebook by value.

    Returns:
        The content of objects.pkl, or None if there is nothing to store or it cannot be stored; and
        in the latter case one line for the user.
    """
    if not objects:
        return None, ""
    file = _LimitedFile()
    try:
        cloudpickle.dump(dict(objects), file)
    except _TooLargeError:
        reason = f"they take more than {MAX_BYTES >> 20} MiB"
    except Exception as error:  # an object's class may raise anything
        reason = first_line(error)
    else:
        return file.getvalue(), ""
    names = ", ".join(objects)
    return None, (
        f"{names} cannot be stored in the run directory ({reason}): pass the same objects to "
        "trainer.resume if the run is interrupted"
    )


def load_objects(content: bytes | None) -> dict[str, Any]:
    """The objects in the content of objects.pkl; none if there is no such file.

    Raises:
        ConfigError: They cannot be unpickled.
    """
    if content is None:
        return {}
    try:
        objects: dict[str, Any] = cloudpickle.loads(content)
    except Exception as error:  # a pickle may raise anything
        raise ConfigError(
            f"objects.pkl cannot be read: {first_line(error)}; pass the objects to trainer.resume"
        ) from error
    return objects
