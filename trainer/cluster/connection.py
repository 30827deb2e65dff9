"""The connection to Ray: an existing cluster if one is configured, otherwise a private Ray.

A private Ray listens on the loopback interface only and requires a token that exists only in the
environment of its processes. It keeps its files in a folder of its own. Its processes and its
folder are removed when the connection closes or this process dies (trainer.cluster.reaper).
"""

import atexit
import logging
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
import ray._private.utils as ray_utils
import ray._private.worker as ray_worker
from ray._private import ray_constants
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import AuthenticationError

from trainer.cluster import reaper
from trainer.cluster.environment import cluster_address
from trainer.cluster.group import ClusterLost
from trainer.cluster.head import HeadMonitor, probe
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError, first_line

PROBE_TIMEOUT_S = 10.0
SOCKET_PATH_MAX = 103  # characters in the path of a Unix socket on macOS; Linux allows 107
RAY_PATH_LENGTH = 85  # length of /trainer-xxxxxxxx/session_DATE_TIME_PID/sockets/plasma_store


class RayConnection:
    """One connection to Ray, from `open` to `close`."""

    _private_ray: "RayConnection | None" = None  # whose private Ray is connected
    _head: HeadMonitor | None = None  # of the cluster that this process is connected to

    def __init__(self, cfg: ClusterConfig, groups: int = 1) -> None:
        """
        Args:
            cfg: the settings of a worker group.
            groups: the number of worker groups that a private Ray must hold at the same time.
        """
        self._cfg = cfg
        self._groups = groups
        self._owner = False  # whether this object opened the connection
        self._folder: str | None = None
        self._reaper: subprocess.Popen[bytes] | None = None
        self._outer_environment: dict[str, str | None] = {}

    @property
    def private(self) -> bool:
        """Whether all workers of the open connection run on this machine, in a private Ray."""
        return RayConnection._private_ray is not None

    @property
    def head(self) -> HeadMonitor:
        """The monitor of the head node; only while the connection is open."""
        assert RayConnection._head is not None
        return RayConnection._head

    @property
    def ends_ray(self) -> bool:
        """Whether `close` ends every process of Ray."""
        return self._folder is not None

    def open(self) -> None:
        """Connect, starting a private Ray if needed. An existing connection is used as it is.

        Raises:
            ConfigError: this process is already connected to another cluster.
            ClusterLost: the head node of the connected cluster does not answer.
            RunError: no Ray answers at the address, or a private one does not start.
        """
        if ray.is_initialized():
            self._check_same_cluster()
        else:
            self._owner = True
            with _keep_sigterm_handler():
                if cluster_address(self._cfg) is None:
                    self._start()
                else:
                    self._connect()
        if RayConnection._head is None:
            RayConnection._head = HeadMonitor(ray.get_runtime_context().gcs_address)
        self.check_head()

    def answers(self) -> bool:
        """Whether the connection is open and the head node answers."""
        head = RayConnection._head
        return head is not None and not head.lost and head.answers()

    def check_head(self) -> None:
        """Raise ClusterLost if the head node is lost, since calls of Ray would then block."""
        if not self.head.wait_until_known():
            raise ClusterLost(self.head.address)

    def close(self) -> None:
        """Disconnect; end a private Ray and remove its folder. May be called twice."""
        if self._owner:
            self._disconnect()
            self._owner = False
        self._remove_private_ray()

    def _remove_private_ray(self) -> None:
        """Remove the processes and the folder of the private Ray, if there is one."""
        if self._reaper:
            self._reaper.communicate()  # closes the pipe and waits until everything is removed
            self._folder = self._reaper = RayConnection._private_ray = None
            _set_environment(self._outer_environment)

    def _disconnect(self) -> None:
        head, RayConnection._head = RayConnection._head, None
        if head is not None:
            head.stop()
            if not self.ends_ray and not head.answers():
                # Ray would wait for the head, now and in its exit handler.
                atexit.unregister(ray_worker.shutdown)
                return
        ray.shutdown()

    def _start(self) -> None:
        """Start a private Ray. Tries twice: on a busy machine 30 s may not suffice."""
        try:
            self._start_once()
        except Exception:
            ray.shutdown()
            self._remove_private_ray()
            try:
                self._start_once()
            except Exception as error:
                raise RunError(
                    f"Ray did not start on this machine, twice ({first_line(error)}); the load "
                    f"average is {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs: wait until it "
                    "is less busy, or run without Ray: cluster=inline"
                ) from error

    def _start_once(self) -> None:
        needed = math.ceil(self._groups * self._cfg.workers * self._cfg.cpus_per_worker)
        self._folder = tempfile.mkdtemp(prefix="trainer-", dir=_short_folder())
        self._reaper = subprocess.Popen(
            [sys.executable, "-P", reaper.__file__, self._folder],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a signal to our process group must not end it first
        )
        RayConnection._private_ray = self
        self._outer_environment = _set_environment(
            {
                "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # bind loopback only, on Linux too
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": secrets.token_hex(32),
                "RAY_worker_niceness": str(self._cfg.nice),
            }
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
            if address and address.rpartition(":")[2].isdigit():
                probe(address, PROBE_TIMEOUT_S)  # Ray itself would try for minutes
            ray.init(address=address, logging_level=logging.ERROR, runtime_env=self._runtime_env())
        except Exception as error:
            if _is_token_error(error):
                raise RunError(
                    f"the Ray cluster at {address} refuses the token: set RAY_AUTH_MODE=token, and "
                    "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own"
                ) from error
            raise RunError(
                f"no Ray cluster answers at {address} (cluster.address or RAY_ADDRESS): "
                f"{first_line(error)}"
            ) from error

    def _check_same_cluster(self) -> None:
        """Raise ConfigError if `cluster.address` names another cluster than the connected one."""
        wanted, present = self._cfg.address, ray.get_runtime_context().gcs_address
        if wanted and wanted != "auto" and _resolve(wanted) != _resolve(present):
            raise ConfigError(
                f"cluster.address={wanted}: this process is connected to the Ray cluster at "
                f"{present}; call ray.shutdown() first, or leave cluster.address out to use it"
            )

    def _runtime_env(self) -> dict[str, Any]:
        """The runtime environment, equal for all workers of the job so that they stay warm."""
        env: dict[str, Any] = {}
        if self._cfg.working_dir:
            env["working_dir"] = self._cfg.working_dir
        if self._cfg.py_modules:
            env["py_modules"] = list(self._cfg.py_modules)
        return env


def _set_environment(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Set environment variables of Ray (None: remove), also if Ray has already read them.

    Returns:
        The values before, to restore them by another call.
    """
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(  # type: ignore[attr-defined]
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, not ray_constants.IS_WINDOWS_OR_OSX
    )
    Config.initialize("")  # first: a thread of Ray may reload the token meanwhile
    AuthenticationTokenLoader.instance().reset_cache()
    return before


@contextmanager
def _keep_sigterm_handler() -> Iterator[None]:
    """Keep our handler of SIGTERM while ray.init would install its own two.

    Its Python handler would end this process with exit code 15 during the rest of ray.init. Its
    native handler calls ours, but aborts the process three seconds later.
    """
    original = ray_utils.set_sigterm_handler
    ray_utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        ray_utils.set_sigterm_handler = original
        handler = signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _resolve(address: str) -> tuple[str, str]:
    """Host, as a numeric address if it can be resolved, and port of `host:port`."""
    host, _, port = address.rpartition(":")
    try:
        return socket.gethostbyname(host.strip("[]")), port
    except OSError:
        return host, port


def _is_token_error(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, is about the token."""
    while error is not None:
        if isinstance(error, AuthenticationError) or "Unauthenticated" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _short_folder() -> str:
    """The folder for temporary files, or /tmp if its path is too long for Ray's socket files."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= SOCKET_PATH_MAX - RAY_PATH_LENGTH else "/tmp"
