"""The energy of a phase: measured by counters and divided by CPU time, or estimated."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer.config import CostConfig
from trainer.engine.world import World
from trainer.errors import ConfigError
from trainer.report.cost import cost_line, training_cost, with_costs
from trainer.worker import energy
from trainer.worker.energy import Counters, EnergyMeter, find_counters

CPU = torch.device("cpu")
ALONE = World.single(CPU)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float, float]]:
    """Seconds of the clock, of this process, of all processes; the last entry is now."""
    times = [(0.0, 10.0, 100.0)]
    monkeypatch.setattr(energy, "_now", lambda loaders: times[-1])
    monkeypatch.setattr(energy.time, "monotonic", lambda: times[-1][0])
    return times


def test_a_processor_is_divided_by_cpu_time(clock: list[tuple[float, float, float]]) -> None:
    meter = EnergyMeter(CPU, Counters(cpu=lambda seconds: 10 * seconds))
    clock.append((20.0, 16.0, 124.0))  # 6 of 24 busy seconds are ours
    meter.read(every=30)  # too soon
    assert meter.total(ALONE) == {
        "cpu_seconds": 6,
        "gpu_seconds": 0,
        "joules": pytest.approx(10 * 20 * 6 / 24),
        "reason": "",
    }
    resumed = EnergyMeter(CPU, Counters(cpu=lambda seconds: 0.0))
    resumed.load(meter.state())
    clock.append((21.0, 17.0, 130.0))
    assert resumed.total(ALONE)["cpu_seconds"] == 7
    assert resumed.total(ALONE)["joules"] == pytest.approx(50)
    half = EnergyMeter(CPU, Counters(cpu=lambda seconds: 0.0))  # one of two workers after one
    half.load(meter.state(), 0.5)
    assert half.total(ALONE)["cpu_seconds"] == pytest.approx(meter.state()["cpu"] / 2)
    assert half.total(ALONE)["joules"] == pytest.approx(meter.state()["joules"] / 2)


def test_processes_are_counted_once_while_they_run_and_when_they_have_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One started by this process, and one by a fork server, whose time os.times() never has."""
    parents = {7: os.getpid(), 8: 1}
    ended = {7: False, 8: False}

    class Process(SimpleNamespace):
        def __hash__(self) -> int:
            return hash(self.pid)

        def cpu_times(self) -> SimpleNamespace:
            return SimpleNamespace(user=2.0, system=1.0)

        def ppid(self) -> int:
            return parents[self.pid]

    def times() -> SimpleNamespace:
        reaped = 3.0 * ended[7]
        return SimpleNamespace(user=5.0, system=1.0, children_user=reaped, children_system=0.0)

    def running() -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid) for pid in parents if not ended[pid]]

    monkeypatch.setattr(energy.psutil, "Process", lambda pid: Process(pid=pid))
    monkeypatch.setattr(energy.multiprocessing, "active_children", running)
    monkeypatch.setattr(energy.os, "times", times)
    loaders: dict[Any, float] = {}
    assert energy._now(loaders)[1] == 12
    ended[7] = True
    assert energy._now(loaders)[1] == 12
    ended[8] = True
    assert energy._now(loaders)[1] == 12


def test_a_counter_that_fails_is_no_measurement(clock: list[tuple[float, float, float]]) -> None:
    meter = EnergyMeter(CPU, Counters(cpu=lambda seconds: None))
    clock.append((1.0, 11.0, 101.0))
    found = meter.total(ALONE)
    assert found["joules"] is None
    assert found["reason"] == "an energy counter could not be read"
    assert found["cpu_seconds"] == 1


def test_a_machine_without_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "powercap")
    assert "no RAPL counter" in find_counters(CPU).reason
    (tmp_path / "powercap").mkdir()
    monkeypatch.setitem(energy.__dict__, "_find_counters", _not_installed)
    assert "pip install" in find_counters(CPU).reason


def _not_installed(_: torch.device) -> Counters:
    raise ModuleNotFoundError("codecarbon")


MEASURED = {"cpu_seconds": 9.0, "gpu_seconds": 0.0, "joules": 3.6e6, "reason": ""}
ESTIMATED = {"cpu_seconds": 3600.0, "gpu_seconds": 7200.0, "joules": None, "reason": "no counter"}


def test_costs() -> None:
    prices = CostConfig(price=0.5, currency="USD", grid=100, cpu_watts=10, gpu_watts=300)
    assert training_cost([MEASURED], prices) == {
        "kwh": 1.0,
        "price": 0.5,
        "currency": "USD",
        "co2_grams": 100.0,
        "evidence": "measured",
        "reason": None,
    }
    assert training_cost([], prices) is None
    both = training_cost([MEASURED, ESTIMATED], prices)
    assert both is not None
    assert both["kwh"] == pytest.approx(1 + 0.010 + 0.600)
    assert cost_line(both) == "1.61 kWh, 0.805 USD, 161 g CO2 (estimated: no counter)"
    assert ", less than 0.01 USD, " in cost_line({**both, "price": 0.0000111})
    summary = {"phases": [{"name": "train", "usage": MEASURED}, {"name": "old"}]}
    found = with_costs(summary, prices)
    assert found["phases"][0]["cost"]["kwh"] == 1
    assert found["phases"][1]["cost"] is None  # of an earlier version
    assert found["cost"] is None


def test_negative_prices_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cost\.price=-1"):
        CostConfig(price=-1)
