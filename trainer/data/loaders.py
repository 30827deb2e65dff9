"""Starts the processes of data loaders, which outlive signals and end with their parent.

A terminal or a job scheduler sends SIGINT or SIGTERM to all processes of a run. The run then trains
to the end of a step and writes a checkpoint, for which it needs its loader processes.
"""

import io
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from multiprocessing import (
    forkserver,
    popen_forkserver,
    process,
    reduction,
    resource_tracker,
    spawn,
    util,
)
from multiprocessing.context import (
    BaseContext,
    ForkServerContext,
    ForkServerProcess,
    set_spawning_popen,
)
from pathlib import Path
from types import FrameType
from typing import Any

from trainer.errors import ConfigError

_MAX_SOCKET_PATH = 107  # bytes of the path of a Unix socket on Linux (unix(7))
_IN_TEMP_DIR = len("/pymp-12345678/listener-12345678")
_GUARDS = ("__name__", "parent_process", "current_process")  # what differs in a new process
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


# Not the server that the program's other code uses: the processes of that code would inherit that
# the signals are blocked, and could not be terminated.
_server = forkserver.ForkServer()


class _LoaderPopen(popen_forkserver.Popen):
    def _launch(self, process_obj: process.BaseProcess) -> None:
        """As that of the parent class, which always uses the program's server."""
        content = io.BytesIO()
        set_spawning_popen(self)
        try:
            reduction.dump(spawn.get_preparation_data(process_obj.name), content)
            reduction.dump(process_obj, content)
        finally:
            set_spawning_popen(None)
        self.sentinel, writer = _server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        parent = os.dup(writer)  # the process sees when it closes, with this one
        self.finalizer = util.Finalize(self, _close_all, (parent, self.sentinel))
        with open(writer, "wb") as file:
            file.write(content.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)

    def terminate(self) -> None:
        """End the process, which ignores SIGTERM."""
        self.kill()


def _close_all(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class _LoaderProcess(ForkServerProcess):
    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> _LoaderPopen:
        return _LoaderPopen(process_obj)


class _LoaderContext(ForkServerContext):
    Process = _LoaderProcess


def fork_server() -> BaseContext:
    """A multiprocessing context that starts processes from a server with torch imported.

    A process with threads, such as Ray's, must not be forked; the server has none. A process starts
    in a tenth of a second, because torch is imported already. It must call `start_loader`.

    Raises:
        ConfigError: The script that runs has no `if __name__ == "__main__":`.
        ValueError: The paths of temporary folders are too long for sockets.
    """
    _check_main_guard()
    _shorten_temp_dir()
    context = _LoaderContext()
    _server.set_forkserver_preload(["torch"])
    resource_tracker.ensure_running()  # first, since it unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        _server.ensure_running()  # the server and its processes inherit the blocked signals
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def start_loader(number: int) -> None:
    """Let this loader process ignore signals, and end when its parent does, whatever it executes.

    The signals have handlers, since a command that the Dataset starts would inherit that they are
    blocked or ignored. torch's own check for the parent finds only the end of the server, which
    lives as long as the loader processes.

    Args:
        number: Of the process, not used.
    """
    for each in _SIGNALS:
        signal.signal(each, _ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    threading.Thread(target=_end_with_parent, daemon=True, name="parent").start()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Ignore a signal: the parent decides what follows from it."""


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_main_guard() -> None:
    """Refuse a script that would run as a whole in each process.

    A new process imports the script under another name, to find the classes that it defines. A
    script that nowhere asks for the name would start the run again.
    """
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if file is None or (spec is not None and spec.name.endswith("__main__")):
        return  # a notebook, or python -m PACKAGE: processes do not import it
    try:
        source = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return  # not a script
    if not any(guard in source for guard in _GUARDS) and _is_starting(vars(main)):
        raise ConfigError(
            f"data.loader_workers: each loader process imports {Path(file).name}, which would "
            'start the run again; put the statement that starts it under `if __name__ == "__main__'
            '":`, or set data.loader_workers=0'
        )


def _is_starting(names: dict[str, Any]) -> bool:
    """Whether this call comes from a statement of the module with these global names."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals is names and frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back
    return False


def _shorten_temp_dir() -> None:
    """Let multiprocessing keep its sockets in /tmp if the path of TMPDIR is too long for them."""
    config = process.current_process()._config  # type: ignore[attr-defined]
    folder = config.get("tempdir")  # folder of this process's sockets, if it has any
    base = os.path.dirname(folder) if folder else tempfile.gettempdir()
    if len(os.fsencode(base)) + _IN_TEMP_DIR <= _MAX_SOCKET_PATH:
        return
    for short in _SHORT_FOLDERS:
        if os.access(short, os.W_OK | os.X_OK):
            config["tempdir"] = tempfile.mkdtemp(prefix="pymp-", dir=short)
            # As multiprocessing.util.get_temp_dir does; child processes inherit the folder.
            util.Finalize(None, shutil.rmtree, args=(config["tempdir"], True), exitpriority=-100)
            return
    raise ValueError(
        f"data.loader_workers: the path {base} is too long for the sockets of loader processes; "
        f"set TMPDIR to a folder of at most {_MAX_SOCKET_PATH - _IN_TEMP_DIR} characters"
    )
