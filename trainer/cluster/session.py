"""Which Ray to use: an existing cluster where one is named, else a private one of our own.

The private one listens on loopback only, asks every connection for a token that exists nowhere but
in the environment of its processes, keeps its files in a folder of its own, and is gone with all of
that when the session ends, or when this process dies (trainer.cluster.reaper).
"""

import logging
import math
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray._private.utils as ray_utils
from ray.exceptions import AuthenticationError

from trainer.cluster import reaper
from trainer.cluster.environment import cluster_address
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError, first_line

KNOCK_TIMEOUT_S = 10.0
SOCKET_PATH_MAX = 103  # characters of a Unix socket's path, on macOS; Linux takes 107
RAY_PATH_LENGTH = 85  # of /trainer-xxxxxxxx/session_DATE_TIME_PID/sockets/plasma_store


class RaySession:
    """One connection to Ray, opened by `open` and ended by `close`.

    A private Ray has room for `groups` groups of workers side by side.
    """

    def __init__(self, cfg: ClusterConfig, groups: int = 1) -> None:
        self._cfg = cfg
        self._groups = groups
        self._ours = False
        self._folder: str | None = None
        self._reaper: subprocess.Popen[bytes] | None = None

    @property
    def private(self) -> bool:
        """Whether this session starts a Ray of its own."""
        return cluster_address(self._cfg) is None

    @property
    def ends_ray(self) -> bool:
        """Whether closing this session ends every process of Ray."""
        return self._folder is not None

    def open(self) -> None:
        """Connect, or start and connect. A Ray that this process already uses is used as it is.

        Raises:
            RunError: no Ray answers at the address.
        """
        if ray.is_initialized():
            return
        self._ours = True
        with _sigterm_stays_ours():
            if self.private:
                self._start()
            else:
                self._connect()

    def close(self) -> None:
        """Disconnect; a private Ray ends, and its folder goes."""
        if self._ours:
            ray.shutdown()
            self._ours = False
        if self._reaper:
            self._reaper.communicate()  # closes the pipe and waits until all is gone
            self._folder = self._reaper = None

    def _start(self) -> None:
        needed = math.ceil(self._groups * self._cfg.workers * self._cfg.cpus_per_worker)
        self._folder = tempfile.mkdtemp(prefix="trainer-", dir=_short_folder())
        self._reaper = subprocess.Popen(
            [sys.executable, "-P", reaper.__file__, self._folder],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a signal to our process group must not end it first
        )
        ray.init(
            address="local",
            num_cpus=max(needed, 1),
            include_dashboard=False,
            logging_level=logging.ERROR,
            _temp_dir=self._folder,
        )

    def _connect(self) -> None:
        address = cluster_address(self._cfg)
        if address and address.startswith(("ray://", "http://", "https://")):
            raise ConfigError(
                f"cluster.address or RAY_ADDRESS={address}: results cannot be streamed through it; "
                "run on a node of the cluster (ray job submit) and give host:port or auto"
            )
        try:
            _knock(address)
            ray.init(address=address, logging_level=logging.ERROR, runtime_env=self._runtime_env())
        except Exception as error:
            if _refused(error):
                raise RunError(
                    f"the Ray cluster at {address} refuses the token: set RAY_AUTH_MODE=token, and "
                    "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own"
                ) from error
            raise RunError(
                f"no Ray cluster answers at {address} (cluster.address or RAY_ADDRESS): "
                f"{first_line(error)}"
            ) from error

    def _runtime_env(self) -> dict[str, Any]:
        """The same for every worker of the job, so that Ray starts none of them twice."""
        env: dict[str, Any] = {}
        if self._cfg.working_dir:
            env["working_dir"] = self._cfg.working_dir
        if self._cfg.py_modules:
            env["py_modules"] = list(self._cfg.py_modules)
        return env


@contextmanager
def _sigterm_stays_ours() -> Iterator[None]:
    """Keep ray.init from setting its own handlers of SIGTERM.

    The one in Python would end this process with exit code 15, in the seconds that the rest of
    ray.init takes. The native one calls ours, but has the process aborted three seconds later.
    """
    theirs = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = theirs
        ours = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread() and ours is not None:
            signal.signal(signal.SIGTERM, ours)


def _knock(address: str | None) -> None:
    """Raise OSError where nothing listens at host:port; Ray itself would try for minutes."""
    host, _, port = (address or "").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), KNOCK_TIMEOUT_S).close()


def _refused(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is about the token."""
    while error is not None:
        if isinstance(error, AuthenticationError) or "Unauthenticated" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _short_folder() -> str:
    """Where temporary files go, unless its path leaves no room for the names of Ray's sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= SOCKET_PATH_MAX - RAY_PATH_LENGTH else "/tmp"
