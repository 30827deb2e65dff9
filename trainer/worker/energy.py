"""What this process uses of its machine: CPU time, GPU time and, where there are counters, joules.

The counters are those of the whole machine (RAPL of Intel and AMD processors, NVML of NVIDIA's
GPUs), read by codecarbon (the extra `energy`). The processor's joules are divided among its
processes by CPU time, so that workers and trials on one machine do not count them twice; a GPU
belongs to its worker.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer.engine.world import World
from trainer.errors import first_line

POWERCAP = Path("/sys/class/powercap")  # where Linux shows the counters
READ_EVERY_S = 30.0  # counters start again at zero after minutes

_JOULES = 3.6e6  # of a kilowatt-hour

Read = Callable[[float], float | None]
"""Joules of a device since the last call, which was so many seconds ago; None: it failed."""


@dataclass
class Counters:
    """Energy counters of this machine."""

    cpu: Read | None = None
    gpu: Read | None = None
    reason: str = ""  # why a counter is missing


class EnergyMeter:
    """Adds up what this process uses, after what it has loaded from a checkpoint.

    Args:
        device: What it trains on.
        counters: Of the machine; None: those that codecarbon finds.
    """

    def __init__(self, device: torch.device, counters: Counters | None = None) -> None:
        self._counters = find_counters(device) if counters is None else counters
        self._on_gpu = device.type == "cuda"
        self._cpu = self._gpu = self._joules = 0.0
        self._loaders: dict[psutil.Process, float] = {}
        self._last = _now(self._loaders)

    def read(self, every: float = 0.0) -> None:
        """Take the counters' values, if the last time was at least `every` seconds ago."""
        before = self._last
        if time.monotonic() - before[0] < every:
            return
        now = self._last = _now(self._loaders)
        seconds, own, busy = (b - a for a, b in zip(before, now, strict=True))
        self._cpu += own
        self._gpu += seconds * self._on_gpu
        share = min(1.0, own / busy) if busy > 0 else 1.0
        for counter, part in ((self._counters.cpu, share), (self._counters.gpu, 1.0)):
            if counter is None:
                continue
            joules = counter(seconds)
            if joules is None:
                self._counters = Counters(reason="an energy counter could not be read")
                return
            self._joules += part * joules

    def state(self) -> dict[str, float]:
        """What a checkpoint needs."""
        self.read()
        return {"cpu": self._cpu, "gpu": self._gpu, "joules": self._joules}

    def load(self, state: Mapping[str, float], share: float = 1.0) -> None:
        """Continue from what `state` returned.

        Args:
            state: Empty: nothing was used before.
            share: Part of it that this process takes over: 1/2 if there are twice as many workers.
        """
        self._cpu += share * state.get("cpu", 0.0)
        self._gpu += share * state.get("gpu", 0.0)
        self._joules += share * state.get("joules", 0.0)

    def total(self, world: World) -> dict[str, Any]:
        """The use of all ranks, as in `PhaseRecord.usage`. A collective call."""
        self.read()
        missing = bool(self._counters.reason)
        values = [self._cpu, self._gpu, self._joules, float(missing)]
        sums = torch.tensor(values, dtype=torch.float64, device=world.device)
        world.all_reduce(sums)
        cpu, gpu, joules, without = sums.tolist()
        reason = self._counters.reason or ("other workers have no energy counters" * bool(without))
        return {
            "cpu_seconds": cpu,
            "gpu_seconds": gpu,
            "joules": None if without else joules,
            "reason": reason,
        }


def find_counters(device: torch.device) -> Counters:
    """The counters of this machine, or the reason why there are none."""
    if not POWERCAP.is_dir():
        return Counters(reason="no RAPL counter")
    try:
        return _find_counters(device)
    except ImportError:
        needed = "run pip install '.[energy]' in the checkout"
        return Counters(reason=f"codecarbon is not installed: {needed}")
    except Exception as error:  # a driver that misbehaves may not end a run
        return Counters(reason=f"the energy counters cannot be read: {first_line(error)}")


def _find_counters(device: torch.device) -> Counters:
    from codecarbon.core.cpu import IntelRAPL, is_rapl_available
    from codecarbon.core.gpu import AllGPUDevices
    from codecarbon.core.units import Time
    from codecarbon.external.logger import logger

    logger.setLevel("ERROR")
    if not is_rapl_available():
        return Counters(reason=f"the energy counters under {POWERCAP} may not be read")
    rapl = IntelRAPL(rapl_include_dram=True)
    rapl.start()

    def cpu(seconds: float) -> float | None:
        found = rapl.get_cpu_details(Time(seconds))
        kwh = [float(of) for name, of in found.items() if "Power" not in name]
        return _JOULES * sum(kwh) if kwh else None

    if device.type != "cuda":
        return Counters(cpu)
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    devices = {str(gpu.get_static_details()["uuid"]): gpu for gpu in AllGPUDevices().devices}
    gpu = devices.get(uuid) or devices.get(f"GPU-{uuid}")
    if gpu is None:
        return Counters(reason="no NVML counter")
    gpu.start()
    used = "delta_energy_consumption"
    return Counters(cpu, lambda seconds: _JOULES * float(gpu.delta(Time(seconds))[used].kWh))


def _now(loaders: dict[psutil.Process, float]) -> tuple[float, float, float]:
    """Seconds of the clock, of this process with its data loaders, and of all CPUs busy.

    Args:
        loaders: CPU time of each process that a fork server started for this one; updated here. It
            is still counted when the process has ended: os.times() covers only direct children.
    """
    times = os.times()
    own = times.user + times.system + times.children_user + times.children_system
    # psutil would find the children by reading the status of all processes of the machine.
    for child in multiprocessing.active_children():
        try:
            process = psutil.Process(child.pid)
            used, parent = process.cpu_times(), process.ppid()
        except psutil.Error:  # it has just ended
            continue
        if parent == os.getpid():
            own += used.user + used.system
        else:
            loaders[process] = used.user + used.system
    own += sum(loaders.values())
    machine = psutil.cpu_times()
    # Guests are also part of the time of users.
    idle = ("idle", "iowait", "guest", "guest_nice")
    busy = sum(machine) - sum(getattr(machine, name, 0.0) for name in idle)
    return time.monotonic(), own, busy
