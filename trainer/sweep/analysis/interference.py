"""Do methods that are used together interfere with one another?

Every combination of phases, some of them left out (`phases.NAME.enabled`), repeated with several
seeds. Each seed is a pair with its own baseline: drops of accuracy are taken within a seed.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from trainer.report.sheets import Sheet
from trainer.sweep.analysis.answer import Answer, Row, Spread, spread

_ENABLED = ".enabled"

Combination = frozenset[str]
Table = Mapping[int, Mapping[Combination, Row]]
"""Trials by seed, and by the methods that they used."""


def interference(rows: Sequence[Row]) -> Answer:
    """A line for each combination, and sentences for each pair of methods and for all together.

    The interaction of a pair is what both together lose, less what each loses alone. A sentence
    claims one only where it is further from zero than twice its standard error over the seeds.
    """
    methods = _methods(rows)
    table = _by_seed(rows, methods)
    every = [frozenset(c) for n in range(len(methods) + 1) for c in combinations(methods, n)]
    answer = Answer(sheets=[_sheet(every, methods, table)])
    answer.figures["accuracy and bytes of each pair of methods"] = _matrix(methods, table)
    for first, second in combinations(methods, 2):
        answer.sentences += _sentences((first, second), table)
    if len(methods) > 2:
        answer.sentences += _sentences(tuple(methods), table)
    return answer


def _methods(rows: Sequence[Row]) -> list[str]:
    """The phases that are left out in some trials, in their order."""
    keys = dict.fromkeys(key for row in rows for key in row.settings if key.endswith(_ENABLED))
    return [key.removesuffix(_ENABLED).rpartition(".")[2] for key in keys]


def _by_seed(rows: Sequence[Row], methods: Sequence[str]) -> Table:
    table: dict[int, dict[Combination, Row]] = {}
    for row in rows:
        used = frozenset(m for m in methods if row.settings[f"phases.{m}{_ENABLED}"])
        table.setdefault(int(row.settings.get("seed", 0)), {})[used] = row
    return table


def _drops(used: Combination, table: Table) -> list[float]:
    """Accuracy lost against the seed's own baseline, in points, of each seed that has both."""
    return [
        100 * (trials[frozenset()].measured["accuracy"] - trials[used].measured["accuracy"])
        for trials in table.values()
        if used in trials and frozenset() in trials
    ]


def _measured(used: Combination, table: Table, measure: str) -> list[float]:
    return [trials[used].measured[measure] for trials in table.values() if used in trials]


def _ratios(used: Combination, table: Table) -> list[float]:
    """How many times smaller than the seed's own baseline."""
    return [
        trials[frozenset()].measured["bytes"] / trials[used].measured["bytes"]
        for trials in table.values()
        if used in trials and frozenset() in trials
    ]


def _sheet(every: Sequence[Combination], methods: Sequence[str], table: Table) -> Sheet:
    lines = []
    for used in every:
        accuracies = _measured(used, table, "accuracy")
        if not accuracies:
            continue
        drops, ratios = _drops(used, table), _ratios(used, table)
        lines.append(
            (
                _name(used, methods),
                spread(accuracies).told(".2f", 100),
                spread(drops).told("+.2f") if used and drops else "",
                spread(_measured(used, table, "bytes")).told(",.0f"),
                f"{spread(ratios).told('.1f')}x" if used and ratios else "",
                str(len(accuracies)),
            )
        )
    return Sheet(
        "every combination",
        ("methods", "accuracy %", "points lost", "bytes", "smaller", "n"),
        lines,
        "means and standard deviations over seeds; validation data; bytes of model.dcz",
    )


def _name(used: Combination, methods: Sequence[str]) -> str:
    return " + ".join(m for m in methods if m in used) or "none"


def _sentences(methods: tuple[str, ...], table: Table) -> list[str]:
    """What the numbers say of some methods used together; nothing where trials are missing."""
    alone = [frozenset({method}) for method in methods]
    together = frozenset(methods)
    needed = {frozenset(), together, *alone}
    whole = {seed: trials for seed, trials in table.items() if needed <= trials.keys()}
    if not whole:
        return []
    parts = [_drops(used, whole) for used in alone]
    both = _drops(together, whole)
    interaction = spread([b - sum(p) for b, *p in zip(both, *parts, strict=True)])
    sizes = [_ratios(used, whole) for used in alone]
    factor = spread(
        [math.log(b / math.prod(p)) for b, *p in zip(_ratios(together, whole), *sizes, strict=True)]
    )
    names = f"{', '.join(methods[:-1])} and {methods[-1]}"
    apart = " and ".join(f"{spread(p).mean:+.2f}" for p in parts)
    return [
        f"{names}: {_verdict(interaction)} Together they lose {spread(both).mean:+.2f} points of "
        f"accuracy, alone {apart} (interaction {interaction.told('+.2f')}, n = {interaction.n}).",
        f"{names}: the file is {spread(_ratios(together, whole)).mean:.1f} times smaller, "
        f"{_of_product(factor)} the product of what each does alone (n = {factor.n}).",
    ]


def _verdict(interaction: Spread) -> str:
    if interaction.n < 2:
        return "one seed shows no spread, so nothing is claimed."
    if not interaction.clear():
        return "no interference beyond the spread over seeds."
    return "they hurt one another." if interaction.mean > 0 else "they help one another."


def _of_product(factor: Spread) -> str:
    share = math.exp(factor.mean)
    sure = "" if factor.clear() else " (not told from it by the spread)" if factor.n > 1 else ""
    return f"{share:.2f} of{sure}"


def _matrix(methods: Sequence[str], table: Table) -> object:
    """Each method alone on the diagonal, pairs beside it."""
    from plotly import graph_objects

    losses: list[list[float | None]] = []
    texts: list[list[str]] = []
    for row in methods:
        losses.append([])
        texts.append([])
        for column in methods:
            used = frozenset({row, column})
            drops, sizes = _drops(used, table), _measured(used, table, "bytes")
            losses[-1].append(spread(drops).mean if drops else None)
            accuracies = _measured(used, table, "accuracy")
            told = (
                ""
                if not sizes
                else (
                    f"{spread(accuracies).told('.2f', 100)} %<br>{spread(sizes).told(',.0f')} bytes"
                )
            )
            texts[-1].append(told)
    names = list(methods)
    figure = graph_objects.Figure(
        graph_objects.Heatmap(
            z=losses,
            x=names,
            y=names,
            text=texts,
            texttemplate="%{text}",
            colorscale="Oranges",
            colorbar={"title": "points lost"},
        )
    )
    figure.update_layout(title="accuracy (validation) and bytes; the diagonal: one method alone")
    figure.update_yaxes(autorange="reversed")
    return figure
