"""The exhibits about hardware: energy, TPU v1, EIE."""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from trainer.hardware.comparison import eie_tables, tpu_tables
from trainer.hardware.comparison.eie import power
from trainer.hardware.comparison.tpu import closed_forms
from trainer.hardware.costs import CostSettings, network_costs
from trainer.hardware.energy import TABLES
from trainer.lecture.compression import LENET300
from trainer.lecture.exhibit import Exhibit, Results
from trainer.library.subject import find_subject
from trainer.report import hardware as report
from trainer.report.table import Table
from trainer.sweeps.analysis import Answer


def _tables(name: str, results: Results) -> Answer:
    return Answer(
        [
            Table(found["title"], tuple(found["header"]), found["rows"], found["note"])
            for found in results.measured(name)
        ]
    )


def _measure_tpu(_: Results, short: bool) -> Any:
    return [asdict(table) for table in ([closed_forms()] if short else tpu_tables())]


def _measure_eie(_: Results, short: bool) -> Any:
    return [asdict(table) for table in ([power()] if short else eie_tables())]


def _measure_energy(results: Results, short: bool) -> Any:
    subject = find_subject(str(results.job(LENET300[0])), [])
    settings = CostSettings(table=TABLES["lecture"])
    if short:
        settings = replace(settings, cpu_seconds=0.01)
    costs = network_costs(subject.model, subject.samples, subject.file, settings)
    return costs.as_dict()


def _energy(results: Results) -> Answer:
    rows = []
    for table in TABLES.values():
        multiply = table.multiply["int8"]
        access = table.off_chip_word
        ratio = f"{access / multiply:,.0f}"
        rows.append((table.name, f"{access:g}", f"{table.on_chip_word:g}", f"{multiply:g}", ratio))
    costs = results.measured("energy")
    stages = costs["stages"]
    share = stages[0]["energy"]["arithmetic"]["value"] / report.total_energy(stages[0])["value"]
    saved = report.total_energy(stages[0])["value"] / report.total_energy(stages[-1])["value"]
    return Answer(
        [
            Table(
                "Picojoules of an operation",
                ("table", "32 bits off the chip", "32 bits on the chip", "8-bit product", "ratio"),
                rows,
                "ratio: an access off the chip, in 8-bit products; the lecture: 800 / 0.2 = 4000",
            ),
            replace(report.table(costs), title="LeNet-300-100, one image, from dense to coded"),
        ],
        {
            "Energy of LeNet-300-100 by cause, modelled: moving data dominates, until the weights "
            "fit on the chip.": partial(report.energies, costs)
        },
        [
            f"Arithmetic is {share:.1%} of the dense network's modelled energy.",
            f"Compressed, the network takes {saved:,.0f} times less.",
        ],
    )


ENERGY = Exhibit(
    "energy",
    "Energy: moving data costs more than arithmetic",
    "What operations and memory accesses cost, and what that makes of a network at each stage of "
    "compression.",
    "the lecture's 800 pJ for a memory access and 0.2 pJ for an 8-bit multiplication; Horowitz, "
    "ISSCC 2014; Han et al., EIE, ISCA 2016, table I",
    0.2,
    _energy,
    LENET300[:1],
    _measure_energy,
)
TPU = Exhibit(
    "tpu",
    "TPU v1",
    "The cycle model of the TPU on its six applications. The layers of these were never published; "
    "the assumed shapes are below, and were fixed before any comparison.",
    "Jouppi et al., ISCA 2017: table 3 and section 7",
    0.3,
    partial(_tables, "tpu"),
    measure=_measure_tpu,
)
EIE = Exhibit(
    "eie",
    "EIE",
    "The cycle model of EIE on random matrices of the published sizes and densities.",
    "Han et al., ISCA 2016: tables II, IV, V, figures 6, 7, 8, 11",
    3,
    partial(_tables, "eie"),
    measure=_measure_eie,
)
