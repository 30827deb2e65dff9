"""Models of hardware: the cost of a network in energy, on TPU v1 and on EIE.

    found = workloads(model, samples)
    stages = stored_weights(model.state_dict(), [name for name, _ in model.named_parameters()])
    for cost in inference_costs(found, stages, table=HOROWITZ, buffer_bytes=8 << 20):
        print(cost.stage, cost.total_picojoules)

`trainer.hardware.tpu` and `trainer.hardware.eie` simulate the two accelerators; docs/hardware.md
says what is modelled and what is assumed.
"""

from trainer.hardware.costs import CostSettings, NetworkCosts, network_costs
from trainer.hardware.energy import EIE_TABLE_I, HOROWITZ, LECTURE, TABLES, EnergyTable
from trainer.hardware.figures import Evidence, Figure
from trainer.hardware.ledger import (
    StageCost,
    Traffic,
    inference_costs,
    ring_bytes,
    training_cost,
)
from trainer.hardware.storage import STAGES, StoredWeights, stored_weights
from trainer.hardware.workloads import (
    Workload,
    artifact_workloads,
    read_fractions,
    uncounted_macs,
    workloads,
)

__all__ = [
    "EIE_TABLE_I",
    "HOROWITZ",
    "LECTURE",
    "STAGES",
    "TABLES",
    "CostSettings",
    "EnergyTable",
    "Evidence",
    "Figure",
    "NetworkCosts",
    "StageCost",
    "StoredWeights",
    "Traffic",
    "Workload",
    "artifact_workloads",
    "inference_costs",
    "network_costs",
    "read_fractions",
    "ring_bytes",
    "stored_weights",
    "training_cost",
    "uncounted_macs",
    "workloads",
]
