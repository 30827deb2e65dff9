"""What the energy of training costs: kilowatt-hours, money and CO2."""

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.config import CostConfig
from trainer.report.text import significant

_JOULES = 3.6e6  # of a kilowatt-hour


def training_cost(usages: Iterable[Mapping[str, Any]], prices: CostConfig) -> dict[str, Any] | None:
    """The cost of phases.

    Args:
        usages: Of each phase, as in `PhaseRecord.usage`; empty: unknown, as for phases of earlier
            versions.
        prices: Of energy, and the power of what is not measured.

    Returns:
        `kwh`, `price` in `currency`, `co2_grams`, `evidence` (measured | estimated: from CPU and
        GPU time at the stated power), and `reason`, why it is estimated, or null. None: the use of
        a phase is unknown, or there is no phase.
    """
    usages = list(usages)
    if not all(usages) or not usages:
        return None
    kwh, reason = 0.0, None
    for usage in usages:
        joules = usage["joules"]
        if joules is None:
            reason = reason or usage["reason"]
            joules = prices.cpu_watts * usage["cpu_seconds"]
            joules += prices.gpu_watts * usage["gpu_seconds"]
        kwh += joules / _JOULES
    return {
        "kwh": kwh,
        "price": kwh * prices.price,
        "currency": prices.currency,
        "co2_grams": kwh * prices.grid,
        "evidence": "measured" if reason is None else "estimated",
        "reason": reason,
    }


def with_costs(summary: Mapping[str, Any], prices: CostConfig) -> dict[str, Any]:
    """The content of summary.json with the cost of each phase, and of all phases together."""
    phases = [
        {**phase, "cost": training_cost([phase.get("usage", {})], prices)}
        for phase in summary["phases"]
    ]
    usages = [phase.get("usage", {}) for phase in phases]
    return {**summary, "phases": phases, "cost": training_cost(usages, prices)}


def cost_line(cost: Mapping[str, Any]) -> str:
    """A cost in one line."""
    kwh, price, grams = (cost[key] for key in ("kwh", "price", "co2_grams"))
    energy = f"{significant(kwh, 3)} kWh" if kwh >= 1 else f"{significant(1000 * kwh, 3)} Wh"
    paid = f"{significant(price, 3)} {cost['currency']}"
    if 0 < price < 0.01:
        paid = f"less than 0.01 {cost['currency']}"
    how = cost["evidence"] + (f": {cost['reason']}" if cost["reason"] else "")
    return f"{energy}, {paid}, {significant(grams, 3)} g CO2 ({how})"
