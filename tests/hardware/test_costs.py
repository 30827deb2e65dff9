"""Costs on all machines: the figures of each stage, and their origins."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.hardware.test_workloads import compressed
from tests.hardware.tpu.models import quantized
from trainer import artifact
from trainer.errors import ConfigError
from trainer.hardware import HOROWITZ, cpu, stored_weights, workloads
from trainer.hardware import costs as costs_of
from trainer.hardware.costs import CostSettings, network_costs, random_samples
from trainer.hardware.eie import EieSettings, encode, random_activations, shared_matrix, simulate
from trainer.hardware.figures import Figure
from trainer.hardware.tpu import compile_network, count_cycles, lower
from trainer.models import LeNet5, LeNet300, LSTMLanguageModel
from trainer.report import hardware as report

QUICK = CostSettings(cpu_seconds=0)


def test_stages_of_a_compressed_model() -> None:
    """Each figure is that of the model that computes it."""
    model, samples = compressed(), torch.rand(2, 1, 28, 28)
    file = artifact.encode(model.state_dict())
    costs = network_costs(model, samples, file, QUICK)
    assert [stage.stage for stage in costs.stages] == ["dense", "pruned", "shared", "coded"]
    dense, pruned, shared, coded = costs.stages
    sizes = stored_weights(model.state_dict(), [n for n, _ in model.named_parameters()], file)
    assert [stage.bytes.value for stage in costs.stages] == [stored.size for stored in sizes]
    assert dense.macs.value == 784 * 300 + 300 * 100 + 1000
    assert coded.macs == Figure(sum(x.nonzero for x in workloads(model, samples)), "measured")
    assert dense.eie is None
    assert pruned.eie is None
    assert shared.eie == coded.eie
    assert shared.eie is not None
    assert shared.eie.macs == coded.macs.value
    assert shared.cpu.macs == shared.tpu.macs == dense.macs.value
    cycles = 0
    for x in costs.layers:
        matrix = shared_matrix(model.state_dict()[x.weight])
        vector = random_activations(x.inputs, x.activation_density.value)
        cycles += simulate(encode(matrix.codes, EieSettings()), vector, EieSettings()).cycles
    assert shared.eie.microseconds == Figure(pytest.approx(cycles / 800), "modelled")
    assert dense.cpu.microseconds.evidence == "measured"
    assert dense.tpu.microseconds.evidence == "assumed"  # as if it were quantized
    assert "not quantized" in " ".join(costs.notes)


def test_a_quantized_model_runs_on_the_tpu() -> None:
    model, samples = quantized(LeNet5(), torch.rand(4, 1, 28, 28)), torch.rand(4, 1, 28, 28)
    costs = network_costs(
        model, samples, settings=CostSettings(batch=4, cpu_seconds=0), dense=LeNet5()
    )
    dense, last = costs.stages
    assert last.stage == "quantized"
    cycles = count_cycles(compile_network(lower(model, samples)))
    assert last.tpu.microseconds == Figure(cycles.seconds * 1e6, "modelled")
    assert last.tpu.microjoules == Figure(cycles.seconds * 4e7, "modelled")
    assert dense.tpu.microseconds.evidence == "assumed"
    # The shapes alone say almost the same as the program.
    assert dense.tpu.microseconds.value == pytest.approx(last.tpu.microseconds.value, rel=0.2)


def test_what_no_machine_executes_is_said() -> None:
    """EIE executes no convolutions; nobody executes attention."""
    model = LeNet5()
    for parameter in model.parameters():
        parameter.data = parameter.data.sign() * 0.5
    costs = network_costs(model, torch.rand(1, 1, 28, 28), settings=QUICK)
    [line] = [note for note in costs.notes if note.startswith("EIE")]
    assert "conv1.weight (a convolution)" in line
    assert f"{(800 * 500 + 5000) / 2_293_000:.1%}" in line
    attention = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    costs = network_costs(attention, torch.rand(1, 5, 8), settings=QUICK)
    assert costs.notes[0].startswith(f"{2 * 5 * 5 * 8:,} multiply-accumulates")


def test_untrained_weights_make_every_size_an_assumption() -> None:
    costs = network_costs(LeNet300(), torch.rand(1, 1, 28, 28), None, QUICK, "assumed")
    plain = costs.as_dict()["stages"][0]
    for figure in (plain["bytes"], plain["macs"], *plain["energy"].values()):
        assert figure["evidence"] == "assumed"
    assert plain["cpu"]["microseconds"]["evidence"] == "measured"


def test_a_batch_needs_samples() -> None:
    with pytest.raises(ConfigError, match="batch=2: there are only 1 samples"):
        network_costs(LeNet300(), torch.rand(1, 1, 28, 28), settings=CostSettings(batch=2))


def test_the_energy_counter_is_preferred_to_an_assumption(tmp_path: Path) -> None:
    """A counter that rises by a joule with each call."""
    file, shown = tmp_path / "energy_uj", [5]

    def call() -> None:
        shown[0] += 1_000_000
        file.write_text(f"{shown[0]}\n")

    found = cpu.measure(call, seconds=0, counter=tmp_path)
    assert found.joules == Figure(pytest.approx(1.0), "measured")
    without = cpu.measure(lambda: None, threads=2, seconds=0, counter=tmp_path / "none")
    assert without.joules == Figure(without.seconds.value * 20, "assumed")
    given = cpu.measure(lambda: None, watts=7, seconds=0, counter=tmp_path / "none")
    assert given.joules == Figure(given.seconds.value * 7, "assumed")


def test_random_samples() -> None:
    assert random_samples((3, 4), None, 2).shape == (2, 3, 4)
    tokens = random_samples((50,), 7, 2)
    assert tokens.dtype == torch.int64
    assert tokens.max() == 6


def test_the_table_marks_how_figures_were_found() -> None:
    costs = network_costs(compressed(), torch.rand(2, 1, 28, 28), settings=QUICK).as_dict()
    costs = json.loads(json.dumps(costs))
    table = report.table(costs)
    cells = dict(zip(table.columns, table.rows[-1], strict=True))
    assert cells["stage"] == "shared"
    assert cells["bytes"] == f"{costs['stages'][-1]['bytes']['value']:,.0f}"
    assert cells["arithmetic"].startswith("~")
    assert cells["CPU uJ"].startswith("?")
    assert cells["EIE us"].startswith("~")
    assert dict(zip(table.columns, table.rows[0], strict=True))["EIE us"] == "–"  # noqa: RUF001
    assert "~ modelled" in table.caption
    for svg in report.charts(costs).values():
        assert svg.startswith("<svg")
    total = report.total_energy(costs["stages"][0])
    assert total["value"] == sum(x["value"] for x in costs["stages"][0]["energy"].values())
    assert total["evidence"] == "modelled"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch=0: it must be at least 1"),
        ({"threads": -1}, "threads=-1: it must be at least 1"),
        ({"buffer_bytes": -1}, "buffer_bytes=-1: it must not be negative"),
        ({"cpu_watts": 0.0}, "cpu_watts=0.0: it must be above 0"),
        ({"cpu_watts": float("nan")}, "cpu_watts=nan: it must be above 0 and finite"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CostSettings(**settings)


def test_weights_that_a_hook_or_parametrization_computes() -> None:
    first, second = nn.Linear(40, 30), nn.Linear(30, 10)
    prune.l1_unstructured(first, "weight", 0.9)
    nn.init.constant_(second.weight, 0.5)
    nn.utils.parametrizations.weight_norm(second)
    last = nn.Linear(10, 10)
    nn.init.constant_(last.weight, 0.5)
    costs = network_costs(nn.Sequential(first, second, last), torch.rand(1, 40), settings=QUICK)
    assert costs.stages[-1].eie is not None
    assert costs.stages[-1].macs.value == 120 + 300 + 100


def test_an_embedding_moves_only_the_rows_of_its_tokens() -> None:
    model = nn.Sequential(nn.Embedding(10_000, 64), nn.Flatten(), nn.Linear(128, 2))
    settings = CostSettings(cpu_seconds=0, table=HOROWITZ, buffer_bytes=0)
    weights = network_costs(model, torch.tensor([[1, 7]]), settings=settings).stages[0]
    read = 4 * (2 * 64 + 2 * 128 + 2)  # bytes
    assert weights.energy["weights"].value == pytest.approx(read / 4 * (640 + 5) / 1e6)


def test_an_lstm_takes_as_long_on_the_tpu_by_its_shapes_as_compiled() -> None:
    """Products with the inputs are made for all steps at once, others step by step."""
    samples = torch.randint(0, 20, (1, 6))
    model = LSTMLanguageModel(vocabulary=20, embedding=300, hidden=300)
    by_shapes = network_costs(model, samples, settings=QUICK).stages[0].tpu.microseconds
    compiled = network_costs(quantized(model, samples), samples, settings=QUICK).stages
    assert [x.stage for x in compiled] == ["dense", "quantized"]
    assert compiled[0].tpu.microseconds.value == pytest.approx(by_shapes.value)
    assert compiled[1].tpu.microseconds.value == pytest.approx(by_shapes.value, rel=0.1)


def test_calls_of_different_sizes_keep_all_rows_on_the_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            levels = x, x[..., :3, :3], x[..., :2, :2]
            return torch.cat([self.head(level).flatten(1) for level in levels], 1)

    monkeypatch.setattr(costs_of, "application_cycles", lambda application: application)
    found = workloads(Pyramid(), torch.rand(2, 8, 5, 5))
    assert (found[0].rows, found[0].calls) == (25 + 9 + 4, 3)
    assert [x.rows for x in costs_of._cycles_of_shapes(found, 1).layers] == [13, 13, 12]
