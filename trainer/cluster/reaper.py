"""Ends what a private Ray leaves behind when its driver is killed.

A process of its own, run as `python reaper.py FOLDER` with a pipe from the driver as its standard
input. The pipe closes when the driver is gone, however it went. Some of Ray's processes notice that
only after a minute by themselves, and nobody else would remove its folder.
"""

import contextlib
import os
import shutil
import sys

import psutil


def reap(folder: str, driver: int) -> None:
    """Kill every process that has a file open in `folder` (Ray's all log there), and remove it.

    The driver itself lives on where it only closed its pipe.
    """
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone meanwhile, or another user's
            if process.pid not in (os.getpid(), driver) and _uses(process, folder):
                process.kill()
    shutil.rmtree(folder, ignore_errors=True)


def _uses(process: psutil.Process, folder: str) -> bool:
    return any(file.path.startswith(folder + os.sep) for file in process.open_files())


if __name__ == "__main__":
    driver = os.getppid()
    sys.stdin.read()
    reap(sys.argv[1], driver)
