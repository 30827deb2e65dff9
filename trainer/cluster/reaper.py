"""Removes processes and files of a private Ray after its driver was killed.

A separate process, run as `python reaper.py FOLDER` with a pipe from the driver as its standard
input. The pipe closes when the driver ends, for any reason. Some of Ray's processes notice the
end of the driver only after a minute, and no process of Ray removes the folder.
"""

import contextlib
import os
import shutil
import sys

import psutil


def reap(folder: str, driver: int) -> None:
    """Kill every process that has a file open in `folder`, and remove the folder.

    All processes of a private Ray have their log files open there. The driver itself is not
    killed: it may have closed its pipe without ending.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it ended meanwhile, or belongs to another user
            if process.pid not in (os.getpid(), driver) and _uses(process, folder):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _uses(process: psutil.Process, folder: str) -> bool:
    return any(file.path.startswith(folder + os.sep) for file in process.open_files())


if __name__ == "__main__":
    driver = os.getppid()
    sys.stdin.read()
    reap(sys.argv[1], driver)
