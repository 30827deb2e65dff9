"""Starts the processes of data loaders."""

import multiprocessing
import os
import shutil
import tempfile
from multiprocessing import process, util
from multiprocessing.context import BaseContext

_MAX_SOCKET_PATH = 107  # bytes of the path of a Unix socket on Linux (unix(7))
_IN_TEMP_DIR = len("/pymp-12345678/listener-12345678")
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def fork_server() -> BaseContext:
    """A multiprocessing context that starts processes from a server with torch imported.

    A process with threads, such as Ray's, must not be forked; the server has none. A process starts
    in a tenth of a second, because torch is imported already.

    Raises:
        ValueError: The paths of temporary folders are too long for sockets.
    """
    _shorten_temp_dir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


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
