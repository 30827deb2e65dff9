"""Analyses of grids claim only what the numbers support."""

import random
import re

import pytest

from trainer.config import SweepConfig
from trainer.errors import ConfigError
from trainer.sweeps.analysis import Row, check_analysis, interference, sensitivity
from trainer.sweeps.analysis.answer import p_value, spread
from trainer.sweeps.analysis.interference import sentences
from trainer.sweeps.space import parse_space


def texts(svg: str) -> set[str]:
    """What a chart says."""
    return set(re.findall(r">([^<>\n]+)</text>", svg))


def trial(seed: int, prune: bool, share: bool, accuracy: float, size: float) -> Row:
    settings = {"seed": seed, "phases.prune.enabled": prune, "phases.share.enabled": share}
    return Row(settings, {"accuracy": accuracy, "bytes": size})


def pairs(losses: list[tuple[float, float, float]], sizes: tuple[float, ...] = (8, 2, 4, 1)):
    """A seed for each triple: percentage points lost by prune, by share, by both."""
    rows = []
    for seed, (prune, share, both) in enumerate(losses):
        base = 0.98 + 0.001 * seed  # its own baseline
        for used, lost, size in zip(
            ((False, False), (True, False), (False, True), (True, True)),
            (0.0, prune, share, both),
            sizes,
            strict=True,
        ):
            rows.append(trial(seed, *used, base - lost / 100, 1000 * size))
    return rows


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([(0.1, 0.1, 0.9), (0.1, 0.2, 1.1), (0.2, 0.1, 1.2)], "they hurt one another."),
        ([(0.5, 0.5, 0.1), (0.5, 0.6, 0.2), (0.6, 0.5, 0.2)], "they help one another."),
        ([(0.1, 0.1, 0.5), (0.3, 0.1, 0.1), (0.2, 0.2, 0.5)], "no significant interference."),
        ([(0.1, 0.1, 0.9)], "one seed allows no conclusion."),
    ],
)
def test_a_sentence_claims_what_the_spread_supports(losses, said: str) -> None:
    answer = interference(pairs(losses))
    accuracy, size = answer.sentences
    assert accuracy.startswith(f"prune and share, accuracy: {said}")
    assert f"n = {len(losses)}" in accuracy
    assert "together 8.0 times smaller, 1.00 of the product of the separate ratios" in size
    unsure = "one seed allows no conclusion" if len(losses) == 1 else "not significant"
    assert size.endswith(f"(n = {len(losses)}, {unsure}).")


def test_a_negative_change_is_worse() -> None:
    accuracy = interference(pairs([(0.1, 0.2, 0.5), (0.1, 0.2, 0.5)])).sentences[0]
    assert "Together -0.50 points, alone -0.10 and -0.20 (interaction -0.20 " in accuracy
    assert "they hurt one another" in accuracy


def combinations(draw: random.Random, seeds: int, both: float) -> list[Row]:
    """Three methods that do not interfere, but for prune and share, by `both` points."""
    rows = []
    names = ("prune", "share", "quantize")
    for seed in range(seeds):
        for code in range(8):
            used = [bool(code & bit) for bit in (1, 2, 4)]
            lost = 0.001 * sum(used) + both / 100 * (used[0] and used[1])
            settings = {f"phases.{n}.enabled": u for n, u in zip(names, used, strict=True)}
            measured = {
                "accuracy": 0.98 - lost + draw.gauss(0, 0.0005),
                "bytes": 1e5 / 3 ** sum(used) * (1 + draw.gauss(0, 0.01)),
            }
            rows.append(Row({"seed": seed, **settings}, measured))
    return rows


def claims(said: list[str]) -> int:
    accuracy = [s for s in said[::2] if "they hurt" in s or "they help" in s]
    return len(accuracy) + sum(", significant)" in s for s in said[1::2])


@pytest.mark.slow
def test_noise_alone_seldom_makes_any_of_the_sentences_claim_something() -> None:
    """In at most one answer in twenty: over 400, 20 on average, and 33 with a chance of 0.2%."""
    draw = random.Random(0)
    answers = [sentences(combinations(draw, 3, 0.0)) for _ in range(400)]
    assert {len(said) for said in answers} == {8}
    assert sum(claims(said) > 0 for said in answers) < 33


def test_what_stands_out_of_the_noise_is_claimed() -> None:
    said = sentences(combinations(random.Random(0), 5, 1.0))
    assert said[0].startswith("prune and share, accuracy: they hurt one another.")
    assert claims(said) == 2  # as well as all three together


@pytest.mark.parametrize(
    ("t", "freedom"),  # 2.5% lie above each: any table of Student's t
    [(12.7062, 1), (4.30265, 2), (3.18245, 3), (2.77645, 4), (2.22814, 10), (2.04227, 30)],
)
def test_p_values_are_those_of_the_tables(t: float, freedom: int) -> None:
    assert p_value(t, freedom) == pytest.approx(0.05, rel=1e-5)
    assert p_value(-t, freedom) == p_value(t, freedom)
    assert p_value(0, freedom) == 1
    assert p_value(float("inf"), freedom) == pytest.approx(0, abs=1e-12)


PAIR = {"phases.prune.enabled": "choice(true,false)", "phases.share.enabled": "choice(true,false)"}
LAYERS = {
    "phases.prune.include": "choice([fc1],[fc2])",
    "phases.prune.sparsity": "choice(0,0.5)",
    "phases.prune.fit.epochs": "range(0,2)",
}
ELSEWHERE = {
    **{key: text for key, text in LAYERS.items() if "epochs" not in key},
    "phases.train.fit.epochs": "choice(0,1)",  # of another phase
}
RATE = {"optimizer.lr": "choice(0.1,0.2)"}


@pytest.mark.parametrize(
    ("analysis", "params", "settings", "said"),
    [
        ("interference", PAIR, {}, "bytes, which this sweep does not measure"),
        ("interference", RATE, {}, "enabled of two phases.*it searches optimizer.lr"),
        ("interference", PAIR | RATE, {}, "also searches optimizer.lr"),
        ("sensitivity", {"phases.prune.overrides.fc1": "choice(0,0.5)"}, {},
         "does not search phases.prune.include, phases.prune.sparsity, phases.prune.fit.epochs"),
        ("sensitivity", ELSEWHERE, {}, "does not search phases.prune.fit.epochs"),
        ("sensitivity", LAYERS | {"phases.prune.sparsity": "choice(0.5,0.9)"}, {},
         "phases.prune.sparsity must have 0 among its values: the dense model"),
        ("sensitivity", LAYERS | {"phases.prune.fit.epochs": "choice(1,2)"}, {},
         "phases.prune.fit.epochs must have 0 among its values: without retraining"),
        ("sensitivity", LAYERS | RATE, {}, "also searches optimizer.lr"),
        ("sensitivity", LAYERS,
         {"conditions": {"phases.prune.fit.epochs": "phases.prune.sparsity > 0"}},
         "sweep.conditions.phases.prune.fit.epochs leaves it out"),
    ],
)  # fmt: skip
def test_what_a_sweep_cannot_answer_is_refused(analysis, params, settings, said: str) -> None:
    objectives = {"accuracy": "maximize"}
    cfg = SweepConfig(params=params, analysis=analysis, objectives=objectives, **settings)
    with pytest.raises(ConfigError, match=said):
        check_analysis(cfg, parse_space(cfg, {}))


def test_what_a_sweep_can_answer_is_not_refused() -> None:
    seeds = {"seed": "choice(0,1)"}
    for analysis, params, objectives in (
        ("interference", PAIR | seeds, {"bytes": "minimize"}),
        ("sensitivity", LAYERS | seeds, {"accuracy": "maximize"}),
        (None, RATE, {"accuracy": "maximize"}),
    ):
        cfg = SweepConfig(params=params, analysis=analysis, objectives=objectives)
        check_analysis(cfg, parse_space(cfg, {}))


def test_the_table_has_every_combination_with_its_spread() -> None:
    (table,) = interference(pairs([(0.1, 0.2, 0.4), (0.3, 0.2, 0.6)])).tables
    assert [row[0] for row in table.rows] == ["none", "prune", "share", "prune + share"]
    assert table.rows[1] == (
        "prune",
        "97.85 ± 0.07",
        "-0.20 ± 0.14",
        "2,000 ± 0",
        "4.0 ± 0.0x",
        "2",
    )
    assert table.rows[0][2] == ""


def test_three_methods_have_three_pairs_and_a_sentence_for_all() -> None:
    rows = []
    for seed in (0, 1):
        for code in range(8):
            used = [bool(code & bit) for bit in (1, 2, 4)]
            names = ("prune", "share", "quantize")
            settings = {f"phases.{n}.enabled": u for n, u in zip(names, used, strict=True)}
            measured = {"accuracy": 0.98 - 0.001 * sum(used), "bytes": 1000.0 / 2 ** sum(used)}
            rows.append(Row({"seed": seed, **settings}, measured))
    answer = interference(rows)
    starts = [sentence.partition(", accuracy:")[0] for sentence in answer.sentences[::2]]
    assert starts == [
        "prune and share", "prune and quantize", "share and quantize",
        "prune, share and quantize",
    ]  # fmt: skip
    (draw,) = answer.figures.values()
    svg = draw()
    assert {"prune", "share", "quantize"} <= texts(svg)
    assert {"-0.10", "-0.20", "250 bytes", "97.80%"} <= texts(svg)  # alone, and in pairs


def test_groups_with_missing_trials_are_left_out() -> None:
    rows = pairs([(0.1, 0.1, 0.2)])[:3]
    answer = interference(rows)
    assert answer.sentences == []
    assert len(answer.tables[0].rows) == 3
    assert interference([]).sentences == []


def test_sensitivity_is_the_largest_sparsity_before_the_first_that_costs_too_much() -> None:
    rows = [
        Row(
            {"seed": 0, "phases.train.fit.epochs": 7, "phases.prune.include": [layer],
             "phases.prune.sparsity": sparsity, "phases.prune.fit.epochs": epochs},
            {"accuracy": accuracy},
        )
        for layer, epochs, accuracies in (
            ("fc1", 0, (0.98, 0.98, 0.97, 0.98)),  # what comes after the fall does not count
            ("fc1", 1, (0.99, 0.98, 0.98, 0.976)),
            ("fc2", 0, (0.98, 0.9, 0.8, 0.5)),
            ("fc3", 0, (0.98, 0.975, 0.97, 0.5)),
        )
        for sparsity, accuracy in zip((0, 0.5, 0.8, 0.9), accuracies, strict=True)
    ]  # fmt: skip
    answer = sensitivity(rows)
    assert answer.tables[0].title.endswith("within 0.5 points of the dense 98.00%")
    assert answer.tables[0].rows == [
        ("fc1", "50.0%", "90.0%"),
        ("fc2", "none", "none"),
        ("fc3", "50.0%", "none"),
    ]
    (draw,) = answer.figures.values()
    assert {"fc1, retrained", "fc3, only pruned", "sparsity of the layer"} <= texts(draw())
    assert sensitivity([]).tables == []
    assert sensitivity(rows[1:4]).tables == []  # there is no trial of the dense model


@pytest.mark.slow
def test_many_layers_have_a_chart_each() -> None:
    rows = [
        Row(
            {"phases.prune.include": [f"layer{n}"], "phases.prune.sparsity": sparsity,
             "phases.prune.fit.epochs": 0},
            {"accuracy": 0.98 - sparsity / 10},
        )
        for n in range(8)
        for sparsity in (0, 0.5)
    ]  # fmt: skip
    figures = sensitivity(rows).figures
    assert len(figures) == 8
    for n, draw in enumerate(figures.values()):
        assert f"layer{n}, only pruned" in texts(draw())


def test_spreads() -> None:
    assert spread([1.0, 2.0, 3.0]).format(".1f") == "2.0 ± 1.0"
    assert spread([1.0]).format(".1f") == "1.0"
    assert spread([1.0, 1.1, 1.2]).is_significant(0.05)
    assert not spread([0.6, 1.0, 1.9]).is_significant(0.05)  # though beyond two standard errors
    assert not spread([1.0, -1.1, 0.2]).is_significant(0.05)
    assert not spread([1.0]).is_significant(0.05)
    assert not spread([2e-16, 2e-16]).is_significant(0.05)  # rounding
    assert spread([2.0, 2.0]).is_significant(0.05)
