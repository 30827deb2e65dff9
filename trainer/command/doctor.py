"""`trainer doctor`: reports the resources of this machine and its cluster, and problems."""

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from trainer.cluster import open_group
from trainer.cluster.environment import available_cpus, cluster_address
from trainer.config import ClusterConfig
from trainer.errors import ConfigError, RunError, first_line
from trainer.report.text import plural

MIN_DISK_GB = 1.0  # below it, checkpoints and Ray's object store may not fit
MIN_MEMORY_GB = 1.0  # of a worker: torch alone takes a third of it
_GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl")


@dataclass(frozen=True)
class Finding:
    """One fact about the machine."""

    subject: str
    text: str
    level: Literal["ok", "note", "fails"] = "ok"  # note: works, but not as well as it could


def examine(cfg: ClusterConfig, folder: Path) -> Iterator[Finding]:
    """Examine the machine, and start and stop the workers that `cfg` asks for.

    Args:
        cfg: Settings of the workers.
        folder: Where run directories would be written.
    """
    yield Finding("python", f"{sys.version.split()[0]}, {sys.executable}")
    yield from _packages()
    yield from _extras()
    yield from _processors(cfg)
    yield _gpus()
    for subject, place in (("output", folder), ("temporary files", Path(tempfile.gettempdir()))):
        yield _disk(subject, place)
    yield _address(cfg)
    yield _workers(cfg)


def _packages() -> Iterator[Finding]:
    """Whether the installed packages are those that this project needs."""
    try:
        metadata.version("trainer")
    except metadata.PackageNotFoundError:
        yield Finding("packages", "trainer itself is not installed: pip install -e .", "fails")
        return
    wrong = [problem for needed in _requirements("") if (problem := _missing(needed))]
    if wrong:
        yield Finding("packages", "; ".join(wrong), "fails")
    names = ("torch", "ray", "optuna", "hydra-core")
    yield Finding("packages", ", ".join(f"{name} {metadata.version(name)}" for name in names))


def _extras() -> Iterator[Finding]:
    """The optional parts, and whether they are installed."""
    try:
        extras = metadata.metadata("trainer").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return
    installed = [name for name in extras if not any(map(_missing, _requirements(name)))]
    missing = [name for name in extras if name not in installed]
    text = f"installed: {', '.join(installed) or 'none'}"
    if missing:
        text += f"; not installed: {', '.join(missing)} (pip install '.[NAME]' in the checkout)"
    yield Finding("extras", text)


def _requirements(extra: str) -> list[Requirement]:
    """The requirements of the package, or those that an extra adds."""
    found = [Requirement(line) for line in metadata.requires("trainer") or []]
    if not extra:
        return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [
        r
        for r in found
        if r.marker is not None
        and r.marker.evaluate({"extra": extra})
        and not r.marker.evaluate({"extra": ""})
    ]


def _missing(needed: Requirement) -> str:
    """The reason why a requirement is not met; empty if it is."""
    try:
        version = metadata.version(needed.name)
    except metadata.PackageNotFoundError:
        return f"{needed.name} is not installed"
    if not needed.specifier.contains(version, prereleases=True):
        return f"{needed.name} {version} is installed, but {needed.specifier} is needed"
    return ""


def _processors(cfg: ClusterConfig) -> Iterator[Finding]:
    """CPUs and memory, compared with the needs of the workers in a private Ray."""
    usable, load = available_cpus(), os.getloadavg()[0]
    text = f"{usable} usable, load average {load:.1f}"
    wanted = cfg.workers * cfg.cpus_per_worker
    if cluster_address(cfg) is None and wanted > usable:
        workers = f"{cfg.workers} {plural('worker', cfg.workers)}"
        text += f"; {workers} would share them: set cluster.workers={max(1, usable)} for speed"
        yield Finding("CPUs", text, "note")
    else:
        yield Finding("CPUs", text)
    memory = psutil.virtual_memory()
    text = f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB available"
    if memory.available < MIN_MEMORY_GB * 1e9 * (1 if cluster_address(cfg) else cfg.workers):
        yield Finding("memory", f"{text}: workers may be killed for lack of memory", "note")
    else:
        yield Finding("memory", text)


def _gpus() -> Finding:
    """GPUs, and whether torch can use those that exist."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        names = ", ".join(torch.cuda.get_device_name(index) for index in range(count))
        return Finding("GPUs", f"{count}: {names}")
    if any(map(os.path.exists, _GPU_DEVICES)):
        build = (
            "a build without CUDA" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"
        )
        return Finding(
            "GPUs",
            f"torch {torch.__version__} ({build}) cannot use the GPU of this machine: install a "
            "build of torch that fits its driver (pytorch.org/get-started); workers use the CPU",
            "note",
        )
    return Finding("GPUs", "none; workers use the CPU")


def _disk(subject: str, folder: Path) -> Finding:
    """Free space, and whether files can be created."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return Finding(subject, f"{folder} cannot be written to: {error.strerror}", "fails")
    text = f"{free:.1f} GB free in {folder}"
    return Finding(subject, text, "ok" if free >= MIN_DISK_GB else "fails")


def _address(cfg: ClusterConfig) -> Finding:
    """The cluster on which workers would run, and whether there is a token for it."""
    address = cluster_address(cfg)
    if cfg.backend == "inline":
        return Finding("cluster", "none: the worker runs in this process (cluster.backend=inline)")
    if address is None:
        return Finding("cluster", "a private Ray on this machine (no cluster.address, RAY_ADDRESS)")
    variables = [name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if name in os.environ]
    token = variables[0] if variables else "none in the environment (RAY_AUTH_TOKEN)"
    return Finding("cluster", f"{address}; token: {token}")


def _workers(cfg: ClusterConfig) -> Finding:
    """Start the workers, as a run would, and stop them."""
    workers = f"{cfg.workers} {plural('worker', cfg.workers)}"
    begin = time.monotonic()
    group = open_group(cfg)
    try:
        group.start()
        hosts = ", ".join(dict.fromkeys(group.nodes))
        return Finding(
            "workers", f"{workers} on {hosts}, {time.monotonic() - begin:.1f} s to start"
        )
    except (ConfigError, RunError) as error:
        return Finding("workers", f"{workers} cannot start: {first_line(error)}", "fails")
    finally:
        group.stop()


def doctor(cfg: ClusterConfig, folder: Path, show: Callable[[str], None]) -> bool:
    """Show all findings. Returns whether nothing would fail."""
    healthy = True
    for found in examine(cfg, folder):
        show(f"{found.level:5}  {found.subject:15}  {found.text}")
        healthy = healthy and found.level != "fails"
    show("a run would work here" if healthy else "a run would fail here")
    return healthy
