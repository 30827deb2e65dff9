"""report.html: complete in itself, well-formed, and right for every kind of run."""

import copy
import itertools
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from trainer.report.distributions import Distribution, distributions
from trainer.report.html import environment
from trainer.report.page import page
from trainer.report.plots import losses
from trainer.report.svg import text_width
from trainer.report.table import Table
from trainer.report.tables import layers, phases, stages, step_times
from trainer.report.theme import CHART

VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = '<script>"</script>&$\\frac{'


def record(name, epochs, **changes):
    return {
        "name": name,
        "kind": "train",
        "seconds": 2.5,
        "steps": 10 * epochs,
        "train_loss": 0.25 if epochs else None,
        "accuracy": 0.975,
        "loss": 0.1,
        "parameters": 1000,
        "learnable": 900,
        "nonzero": 80,
        "sparsity": 0.92,
        "sent_bytes_per_step": 4000,
        "images_per_second": 512.0 if epochs else None,
        **changes,
    }


def epochs(phase, count):
    return [
        {"phase": phase, "epoch": n, "train_loss": 1 / (1 + n), "loss": 1 / n, "accuracy": 0.9}
        for n in range(1, count + 1)
    ]


SUMMARY = {
    "name": "mine",
    "seed": 3,
    "precision": "bf16",
    "device": "cpu",
    "workers": 3,
    "status": "done",
    "error": None,
    "nodes": ["alpha", "alpha", "beta"],
    "restarts": 1,
    "versions": {"python": "3.11.9", "torch": "2.13.0", "ray": "2.60.0"},
    "seconds": 1234.5,
    "images_per_second": 512.0,
    "accuracy": 0.9321,
    "loss": 0.22,
    "baseline_accuracy": 0.9456,
    "phases": [record("train", 3), record("prune", 0), record("share", 1)],
}
ARTIFACT = {
    "path": "model.dcz",
    "bytes": 44342,
    "dense_bytes": 1724320,
    "ratio": 38.886,
    "accuracy": 0.9322,
    "baseline_accuracy": 0.9456,
    "stages": [
        {
            "name": "dense",
            "bytes": 1724320,
            "ratio": 1.0,
            "accuracy": 0.9456,
            "loss": 0.2,
            "published": {"ratio": 1.0, "error": 0.008},
        },
        {
            "name": "P+S",
            "bytes": 209579,
            "ratio": 8.23,
            "accuracy": 0.93,
            "loss": 0.21,
            "published": {"ratio": 33, "error": None},
        },
        {
            "name": "model.dcz",
            "bytes": 44342,
            "ratio": 38.886,
            "accuracy": 0.9322,
            "loss": 0.22,
            "published": None,
        },
    ],
    "layers": [
        {"name": "fc.weight", "weights": 5000, "nonzero": 500, "bits": 4, "bytes": 540},
        {"name": "fc.bias", "weights": 0, "nonzero": 0, "bits": 16, "bytes": 18},
    ],
}
METRICS = [*epochs("train", 3), *epochs("share", 1)]
CONFIG = {"name": "mine", "phases": {"prune": {"sparsity": 0.92}}}


def tensor(name="fc.weight", k=4, weights=100):
    values = np.linspace(-1, 1, k)
    return Distribution(
        name, np.linspace(-1, 1, 11), np.full(10, weights // 10), values, np.full(k, weights // k)
    )


class Page(HTMLParser):
    """Fails where elements do not close in order; keeps what a reader or a browser would see."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells, self.text = [], [], [], [], ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)

    def ids(self):
        return [value for key, value in self.attributes if key == "id"]


@pytest.fixture(scope="module")
def whole():
    shared = [tensor(), tensor("conv.weight", k=300, weights=600)]
    return page({**SUMMARY, "artifact": ARTIFACT}, METRICS, CONFIG, shared)


def test_every_number_of_the_tables_is_on_the_page(whole):
    parsed = Page(whole)
    for table in (phases(SUMMARY), stages(ARTIFACT), layers(ARTIFACT)):
        for row in table.rows:
            assert {cell for cell in row if cell} <= set(parsed.cells)
    for part in (
        "3 workers on 2 machines: alpha (2), beta (1)",
        "1,234.5",
        "2.13.0",
        "2.60.0",
        "93.22%",
        "38.9x",
        "44.3 kB",
    ):
        assert part in parsed.text
    assert "sparsity: 0.92" in parsed.text
    assert parsed.tags.count("svg") == 5
    assert "published: dense, 1x" in parsed.text
    assert "Hollow: published." in parsed.text
    assert "P: pruned; S: values shared" in parsed.text
    assert "after: 300 values" in parsed.text


def test_nothing_is_fetched_and_every_reference_stays_on_the_page(whole):
    parsed = Page(whole)
    assert not {"script", "link", "img", "iframe", "image"} & set(parsed.tags)
    ids = parsed.ids()
    assert len(ids) == len(set(ids))
    for key, value in parsed.attributes:
        if key.endswith("href") or key == "src":
            assert value.removeprefix("#") in ids
        elif "url(" in (value or ""):
            assert value.split("url(#")[1].split(")")[0] in ids
        elif not key.startswith("xmlns"):
            assert "http" not in (value or "")
    assert "@import" not in whole


def test_the_same_run_gives_the_same_page():
    assert page(SUMMARY, METRICS, CONFIG) == page(SUMMARY, METRICS, CONFIG)


def test_names_are_text_wherever_they_come_from():
    summary = copy.deepcopy({**SUMMARY, "artifact": ARTIFACT})
    summary |= {"name": HOSTILE, "error": HOSTILE, "status": "limits", "nodes": [HOSTILE]}
    summary["phases"][0]["name"] = HOSTILE
    summary["artifact"]["stages"][1]["name"] = HOSTILE
    summary["artifact"]["layers"][0]["name"] = HOSTILE
    text = page(summary, epochs(HOSTILE, 3), {"name": HOSTILE}, [tensor(HOSTILE)])
    parsed = Page(text)
    assert "script" not in parsed.tags
    assert "<script" not in text
    # title, heading, error, node, phase, stage, layer, configuration, weights; and in the plots.
    assert parsed.text.count(HOSTILE) >= 12


def test_a_run_that_only_trained_has_no_section_on_compression():
    parsed = Page(page({**SUMMARY, "baseline_accuracy": None}, METRICS, CONFIG))
    assert parsed.tags.count("svg") == 2
    assert "Compression" not in parsed.text
    assert "sharing" not in parsed.text
    assert "8.0%" in parsed.text


def test_without_published_figures_nothing_is_said_of_them():
    artifact = copy.deepcopy(ARTIFACT)
    for stage in artifact["stages"]:
        stage["published"] = None
    parsed = Page(page({**SUMMARY, "artifact": artifact}, METRICS, CONFIG))
    assert "ublished" not in parsed.text
    assert "Han" not in parsed.text
    assert stages(artifact).columns[-1] == "loss"


def test_perplexity_is_for_language_models_only():
    images = {**SUMMARY, "artifact": ARTIFACT}
    assert "perplexity" not in page(images, METRICS, CONFIG)
    assert "perplexity: e to the loss" in page(
        {**images, "sequence_targets": True}, METRICS, CONFIG
    )


def test_stages_show_perplexity_and_what_was_published():
    table = stages(ARTIFACT, perplexities=True)
    assert len(set(table.columns)) == len(table.columns)
    assert table.rows[0][3:] == ("5.44%", "0.2000", "1.2214", "1x, 0.80%")
    assert [row[-1] for row in table.rows] == ["1x, 0.80%", "33x", ""]
    unknown = copy.deepcopy(ARTIFACT)
    unknown["stages"][0]["loss"], unknown["stages"][1]["loss"] = None, 1e6
    assert [row[4:6] for row in stages(unknown, perplexities=True).rows[:2]] == [
        ("–", "–"),  # noqa: RUF001
        ("1000000.0000", "inf"),
    ]


def test_the_letters_of_stages_are_explained_where_they_occur():
    artifact = copy.deepcopy(ARTIFACT)
    artifact["stages"][1]["name"] = "S+Q+H (Han's format)"
    legend = "S: values shared; Q: quantized; H: Huffman-coded\n"
    assert stages(artifact).caption.startswith(legend)


def test_the_rows_of_the_layers_add_up_to_the_file():
    table = layers(ARTIFACT)
    column = table.columns.index("bytes")
    assert sum(int(row[column].replace(",", "")) for row in table.rows) == ARTIFACT["bytes"]
    assert table.rows[-1][0] == "names, shapes, checksums"


def test_quantizers_count_as_bytes_of_their_layer():
    def layer(name, size):
        return {"name": name, "weights": 10, "nonzero": 10, "bits": 8, "bytes": size}

    names = {
        "conv.bias": 1,
        "conv.input_quantizer.range": 2,
        "conv.weight": 4,
        "conv.weight_quantizer.scale": 8,
        "add.input_quantizer.range": 16,
        "add.input_quantizer.width": 32,
        "output_quantizer.range": 64,
    }
    artifact = {**ARTIFACT, "layers": [layer(name, size) for name, size in names.items()]}
    artifact["bytes"] = 227
    table = layers(artifact)
    sizes = {row[0]: int(row[table.columns.index("bytes")]) for row in table.rows}
    assert sizes == {
        "conv.bias": 1,
        "conv.weight": 14,
        "add.quantizers": 48,
        "quantizers": 64,
        "names, shapes, checksums": 100,
    }


def test_date_and_command_are_on_the_page():
    summary = {**SUMMARY, "date": "2026-11-29 03:00", "command": "python -m trainer +experiment=x"}
    parsed = Page(page(summary, METRICS, CONFIG))
    assert "2026-11-29 03:00" in parsed.text
    assert "python -m trainer +experiment=x" in parsed.text


def test_colours_follow_the_theme_of_the_page(whole):
    """Every colour of a chart is a variable that the page defines for light and for dark."""
    svgs = re.findall(r"<svg.*?</svg>", whole, re.DOTALL)
    colours = [re.sub(r"var\(--\w+,#\w+\)", "", svg) for svg in svgs]
    assert all(not re.search("#[0-9a-f]{6}|black|white", svg) for svg in colours)
    used = {name for svg in svgs for name in re.findall(r"var\(--(\w+),", svg)}
    light, dark = whole.split("@media (prefers-color-scheme: dark)", 1)
    for name in used:
        assert f"--{name}: {CHART[name][0]};" in light
        assert f"--{name}: {CHART[name][1]};" in dark
    assert len({light for light, _ in CHART.values()}) == len(CHART)


def test_names_of_phases_do_not_overlap():
    counts = {"train": 12, "prune": 0, "prune_more": 0, "retrain": 1, "a_long_name": 1, "share": 0}
    summary = {**SUMMARY, "phases": [record(name, count) for name, count in counts.items()]}
    metrics = [entry for name, count in counts.items() for entry in epochs(name, count)]
    for svg in re.findall(r"<svg.*?</svg>", page(summary, metrics, CONFIG), re.DOTALL):
        texts = re.findall(r'text-anchor: (start|end)[^>]*x="([\d.]+)" y="([\d.]+)">(\w+)<', svg)
        boxes = []
        for anchor, x, y, name in [text for text in texts if text[3] in counts]:
            width = 72 * text_width(name, 8.5)
            left = float(x) - width * (anchor == "end")
            boxes.append((left, left + width, float(y)))
        assert len(boxes) == len(counts)
        for left, right, y in boxes:
            assert 0 <= left < right <= 317
            assert y > 7  # below the upper edge
        for one, other in itertools.combinations(boxes, 2):
            beside = one[0] >= other[1] or other[0] >= one[1]
            assert beside or abs(one[2] - other[2]) > 9


@pytest.mark.filterwarnings("error")
def test_losses_may_be_negative():
    metrics = epochs("train", 3)
    for entry, loss in zip(metrics, (5.0, 0.1, -2.0), strict=True):
        entry["train_loss"] = entry["loss"] = loss
    assert "<svg" in losses([record("train", 3)], metrics)


def test_a_run_without_training_shows_what_each_phase_left():
    summary = {**SUMMARY, "phases": [record("prune", 0)], "images_per_second": None}
    parsed = Page(page(summary, [], CONFIG))
    assert parsed.tags.count("svg") == 2
    assert "97.50%" in parsed.cells


@pytest.mark.filterwarnings("error")
def test_what_is_missing_is_left_out():
    """A summary of an older version, with null for what was not a number."""
    broken = record("train", 1, loss=None, train_loss=None)
    summary = {**SUMMARY, "phases": [broken], "loss": None, "nodes": []}
    del summary["versions"]
    nothing = [{"phase": "train", "epoch": 1, "train_loss": None, "loss": None, "accuracy": 0.1}]
    parsed = Page(page(summary, nothing, CONFIG))
    assert "–" in parsed.cells  # noqa: RUF001
    assert "None" not in parsed.text
    assert "nodes" not in parsed.text


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["a" * 200, "\u8a13\u7df4"])
def test_no_name_brings_a_plot_out_of_shape(name):
    summary = {**SUMMARY, "phases": [record(name, 3), record("prune", 0)]}
    Page(page(summary, epochs(name, 3), CONFIG))


@pytest.mark.slow
def test_of_many_tensors_the_largest_are_drawn():
    shared = [tensor(f"layer{n}.weight", weights=100 * (n + 1)) for n in range(26)]
    parsed = Page(page({**SUMMARY, "artifact": ARTIFACT}, METRICS, CONFIG, shared))
    assert parsed.tags.count("svg") == 3 + 24
    assert "2 more are not drawn" in parsed.text
    assert "layer1.weight" not in parsed.text
    assert "layer2.weight" in parsed.text


def test_weights_before_and_after_sharing():
    before = {
        "fc.weight": torch.tensor([[0.0, -1.0, -0.8], [0.4, 0.6, 0.5]]),
        "fc.bias": torch.tensor([1.0, 1.0, 1.0, 1.0]),
        "dense.weight": torch.arange(1.0, 7).view(2, 3),
        "count": torch.ones(2, 2, dtype=torch.int64),
    }
    after = before | {"fc.weight": torch.tensor([[0.0, -0.9, -0.9], [0.5, 0.5, 0.5]])}
    (found,) = distributions(before, after)
    assert found.name == "fc.weight"
    assert found.values == pytest.approx([-0.9, 0.5])
    assert found.sizes.tolist() == [2, 3]
    assert found.counts.sum() == 5
    assert (found.edges[0], found.edges[-1]) == pytest.approx((-1.0, 0.6))
    assert found.counts[0] == 1


def test_dotted_names_break_after_dots_and_underscores_on_a_phone():
    rendered = (
        environment()
        .get_template("macros.html.j2")
        .module.table(Table("", ("trial", "model.kernel_size.0"), [("1", "3")]))
    )
    assert 'data-column="model.\u200bkernel_\u200bsize.\u200b0"' in rendered
    assert ">model.kernel_size.0<" in rendered


def test_the_time_of_a_step_is_shown_for_each_phase_and_rank():
    assert step_times(SUMMARY) is None
    times = {"step": 5.0, "forward": 3.0, "exposed_communication": 2.0, "hidden_communication": 1.0}
    waits = {**times, "exposed_communication": 3.5}
    profile = {"steps": 7, "ranks": [waits, times]}
    summary = {**SUMMARY, "phases": [{**SUMMARY["phases"][0], "profile": profile}]}
    table = step_times(summary)
    assert table.columns[-2:] == ("exposed communication", "hidden communication")
    assert [row[-2] for row in table.rows] == ["3.50", "2.00"]
    assert table.caption == f"{SUMMARY['phases'][0]['name']} waits for rank 1"
    text = page(summary, [], {})
    assert "Time of a step" in text
    assert "waits for rank 1" in text
    profile["steps"] = 0  # a phase of a single step
    assert step_times(summary) is None
