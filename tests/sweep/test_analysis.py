"""What grids of trials say: only what their numbers support."""

import pytest

from trainer.sweep.analysis import Row, interference, sensitivity
from trainer.sweep.analysis.answer import spread


def trial(seed: int, prune: bool, share: bool, accuracy: float, size: float) -> Row:
    settings = {"seed": seed, "phases.prune.enabled": prune, "phases.share.enabled": share}
    return Row(settings, {"accuracy": accuracy, "bytes": size})


def pairs(losses: list[tuple[float, float, float]], sizes: tuple[float, ...] = (8, 2, 4, 1)):
    """A seed for each triple: points lost by prune, by share, by both."""
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
        ([(0.1, 0.1, 0.5), (0.3, 0.1, 0.1), (0.2, 0.2, 0.5)], "no interference beyond the spread"),
        ([(0.1, 0.1, 0.9)], "one seed shows no spread, so nothing is claimed."),
    ],
)
def test_a_sentence_claims_what_the_spread_supports(losses, said: str) -> None:
    answer = interference(pairs(losses))
    accuracy, size = answer.sentences
    assert accuracy.startswith(f"prune and share: {said}")
    assert f"n = {len(losses)}" in accuracy
    assert "8.0 times smaller, 1.00 of the product" in size.replace(
        " (not told from it by the spread)", ""
    )


def test_the_table_has_every_combination_with_its_spread() -> None:
    (sheet,) = interference(pairs([(0.1, 0.2, 0.4), (0.3, 0.2, 0.6)])).sheets
    assert [row[0] for row in sheet.rows] == ["none", "prune", "share", "prune + share"]
    assert sheet.rows[1] == (
        "prune",
        "97.85 ± 0.07",
        "+0.20 ± 0.14",
        "2,000 ± 0",
        "4.0 ± 0.0x",
        "2",
    )
    assert sheet.rows[0][2] == ""


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
    starts = [sentence.partition(":")[0] for sentence in answer.sentences[::2]]
    assert starts == [
        "prune and share", "prune and quantize", "share and quantize",
        "prune, share and quantize",
    ]  # fmt: skip
    assert len(answer.figures) == 1


def test_missing_trials_are_not_talked_about() -> None:
    rows = pairs([(0.1, 0.1, 0.2)])[:3]
    answer = interference(rows)
    assert answer.sentences == []
    assert len(answer.sheets[0].rows) == 3
    assert interference([]).sentences == []


def test_sensitivity_is_the_largest_sparsity_before_the_first_that_costs_too_much() -> None:
    rows = [
        Row(
            {"phases.prune.include": [layer], "phases.prune.sparsity": sparsity,
             "phases.prune.fit.epochs": epochs},
            {"accuracy": accuracy},
        )
        for layer, epochs, accuracies in (
            ("fc1", 0, (0.98, 0.97, 0.98)),  # what comes after the fall does not count
            ("fc1", 1, (0.98, 0.98, 0.976)),
            ("fc2", 0, (0.9, 0.8, 0.5)),
        )
        for sparsity, accuracy in zip((0.5, 0.8, 0.9), accuracies, strict=True)
    ]  # fmt: skip
    answer = sensitivity(rows)
    assert answer.sheets[0].rows == [("fc1", "50.0%", "90.0%"), ("fc2", "none", "none")]
    (figure,) = answer.figures.values()
    lines = {line.name: list(line.y) for line in figure.data}
    assert lines["fc1, retrained"] == pytest.approx([98, 98, 97.6])
    assert sensitivity([]).sheets == []


def test_spreads() -> None:
    assert spread([1.0, 2.0, 3.0]).told(".1f") == "2.0 ± 1.0"
    assert spread([1.0]).told(".1f") == "1.0"
    assert spread([1.0, 1.1, 1.2]).clear()
    assert not spread([1.0, -1.1, 0.2]).clear()
    assert not spread([1.0]).clear()
