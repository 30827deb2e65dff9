"""Starts the processes of data loaders."""

import ast
import multiprocessing
import os
import shutil
import sys
import tempfile
from multiprocessing import process, util
from multiprocessing.context import BaseContext
from pathlib import Path
from types import FrameType

from trainer.errors import ConfigError

_MAX_SOCKET_PATH = 107  # bytes of the path of a Unix socket on Linux (unix(7))
_IN_TEMP_DIR = len("/pymp-12345678/listener-12345678")
_GUARDS = {"__name__", "parent_process", "current_process"}  # what differs in a new process
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def fork_server() -> BaseContext:
    """A multiprocessing context that starts processes from a server with torch imported.

    A process with threads, such as Ray's, must not be forked; the server has none. A process starts
    in a tenth of a second, because torch is imported already.

    Raises:
        ConfigError: The script that runs has no `if __name__ == "__main__":`.
        ValueError: The paths of temporary folders are too long for sockets.
    """
    _check_main_guard()
    _shorten_temp_dir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return context


def _check_main_guard() -> None:
    """Refuse a script that would run as a whole in each process.

    A new process imports the script under another name, to find the classes that it defines. The
    statement of the script that runs now must therefore depend on the name.
    """
    main = sys.modules["__main__"]
    file, spec = getattr(main, "__file__", None), getattr(main, "__spec__", None)
    if file is None or (spec is not None and spec.name.endswith("__main__")):
        return  # a notebook, or python -m PACKAGE: processes do not import it
    lines, is_running = [], False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals is vars(main) and frame.f_code.co_filename == file:
            lines.append(frame.f_lineno)
            is_running = frame.f_code.co_name == "<module>"
        frame = frame.f_back
    if not is_running:
        return
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):  # it has changed or is no file
        return
    conditions = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
    guards = [node for node in conditions if _GUARDS & _names(node.test)]
    if not any(node.lineno <= line <= (node.end_lineno or 0) for node in guards for line in lines):
        raise ConfigError(
            f"data.loader_workers: each loader process imports {Path(file).name}, which would "
            'start the run again; put the statement that starts it under `if __name__ == "__main__'
            '":`, or set data.loader_workers=0'
        )


def _names(test: ast.expr) -> set[str]:
    """The names and attributes in an expression."""
    nodes = [*ast.walk(test)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


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
