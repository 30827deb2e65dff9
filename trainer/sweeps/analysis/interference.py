"""Do methods that are used together interfere with one another?

Every combination of phases, some of them left out (`phases.NAME.enabled`), repeated with several
seeds. Each seed is a pair with its own baseline: drops of accuracy are taken within a seed.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations

from trainer.errors import ConfigError
from trainer.report.tables import Table
from trainer.sweeps.analysis.answer import Answer, Row, Spread, spread
from trainer.sweeps.analysis.searched import check_searched
from trainer.sweeps.space import Space

LEVEL = 0.05  # how often chance alone may make any sentence of an answer claim something

_PHASES, _ENABLED = "phases.", ".enabled"

Combination = frozenset[str]
Trials = Mapping[int, Mapping[Combination, Row]]
"""Trials by seed, and by the methods that they used."""


def check(space: Space, measured: Collection[str]) -> None:
    """Refuse a sweep that cannot say anything of methods. Raises ConfigError."""
    keys = [parameter.key for parameter in space.parameters]
    methods = _methods(keys)
    if len(methods) < 2:
        raise ConfigError(
            "sweep.analysis=interference: sweep.params must search phases.NAME.enabled of two "
            f"phases or more, each choice(true,false); it searches {', '.join(keys)}"
        )
    check_searched("interference", space, [f"{_PHASES}{m}{_ENABLED}" for m in methods])
    if "bytes" not in measured:
        raise ConfigError(
            "sweep.analysis=interference: it compares bytes, which this sweep does not measure; "
            "add bytes: minimize to sweep.objectives"
        )


def interference(rows: Sequence[Row]) -> Answer:
    """A line for each combination, and sentences for each pair of methods and for all together."""
    methods = _methods(key for row in rows for key in row.settings)
    table = _by_seed(rows, methods)
    every = [frozenset(c) for n in range(len(methods) + 1) for c in combinations(methods, n)]
    return Answer(
        [_table(every, methods, table)],
        {"accuracy and bytes of each pair of methods": _matrix(methods, table)},
        sentences(rows),
    )


def sentences(rows: Sequence[Row]) -> list[str]:
    """Two for each pair of methods, and for all together where there are more: accuracy, bytes.

    The interaction of methods is what they lose together, less what each loses alone; of bytes,
    the ratio of what they save together to the product of what each saves. A sentence claims one
    where its mean over the seeds differs from none by Student's t test. As each sentence is one
    more chance to be wrong, each test is held to `LEVEL` divided by their number (Bonferroni).
    Nothing is said where trials are missing.
    """
    methods = _methods(key for row in rows for key in row.settings)
    table = _by_seed(rows, methods)
    groups: list[tuple[str, ...]] = [*combinations(methods, 2)]
    if len(methods) > 2:
        groups.append(tuple(methods))
    whole = {group: _whole(group, table) for group in groups}
    said = [group for group in groups if whole[group]]
    level = LEVEL / max(1, 2 * len(said))
    return [sentence for group in said for sentence in _sentences(group, whole[group], level)]


def _methods(keys: Iterable[str]) -> list[str]:
    """The phases that are left out in some trials, in their order."""
    found = dict.fromkeys(k for k in keys if k.startswith(_PHASES) and k.endswith(_ENABLED))
    return [key.removeprefix(_PHASES).removesuffix(_ENABLED) for key in found]


def _by_seed(rows: Sequence[Row], methods: Sequence[str]) -> Trials:
    table: dict[int, dict[Combination, Row]] = {}
    for row in rows:
        used = frozenset(m for m in methods if row.settings[f"{_PHASES}{m}{_ENABLED}"])
        table.setdefault(int(row.settings.get("seed", 0)), {})[used] = row
    return table


def _drops(used: Combination, table: Trials) -> list[float]:
    """Accuracy lost against the seed's own baseline, in points, of each seed that has both."""
    return [
        100 * (trials[frozenset()].measured["accuracy"] - trials[used].measured["accuracy"])
        for trials in table.values()
        if used in trials and frozenset() in trials
    ]


def _measured(used: Combination, table: Trials, measure: str) -> list[float]:
    return [trials[used].measured[measure] for trials in table.values() if used in trials]


def _ratios(used: Combination, table: Trials) -> list[float]:
    """How many times smaller than the seed's own baseline."""
    return [
        trials[frozenset()].measured["bytes"] / trials[used].measured["bytes"]
        for trials in table.values()
        if used in trials and frozenset() in trials
    ]


def _table(every: Sequence[Combination], methods: Sequence[str], table: Trials) -> Table:
    lines = []
    for used in every:
        accuracies = _measured(used, table, "accuracy")
        if not accuracies:
            continue
        drops, ratios = _drops(used, table), _ratios(used, table)
        lines.append(
            (
                _name(used, methods),
                spread(accuracies).format(".2f", 100),
                spread(drops).format("+.2f") if used and drops else "",
                spread(_measured(used, table, "bytes")).format(",.0f"),
                f"{spread(ratios).format('.1f')}x" if used and ratios else "",
                str(len(accuracies)),
            )
        )
    return Table(
        "every combination",
        ("methods", "accuracy %", "points lost", "bytes", "smaller", "n"),
        lines,
        "means and standard deviations over seeds; validation data; bytes of model.dcz; below, "
        f"interactions that Student's t test supports at {LEVEL:.0%} over all sentences together",
    )


def _name(used: Combination, methods: Sequence[str]) -> str:
    return " + ".join(m for m in methods if m in used) or "none"


def _whole(methods: tuple[str, ...], table: Trials) -> Trials:
    """The seeds that have the baseline, each of the methods alone, and all of them together."""
    needed = {frozenset(), frozenset(methods), *(frozenset({method}) for method in methods)}
    return {seed: trials for seed, trials in table.items() if needed <= trials.keys()}


def _sentences(methods: tuple[str, ...], whole: Trials, level: float) -> list[str]:
    """What the numbers say of some methods used together: of accuracy, and of bytes."""
    alone = [frozenset({method}) for method in methods]
    together = frozenset(methods)
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
        f"{names}: {_verdict(interaction, level)} Together they lose {spread(both).mean:+.2f} "
        f"points of accuracy, alone {apart} (interaction {interaction.format('+.2f')}, "
        f"n = {interaction.n}).",
        f"{names}: the file is {spread(_ratios(together, whole)).mean:.1f} times smaller, "
        f"{math.exp(factor.mean):.2f} of the product of what each does alone "
        f"(n = {factor.n}{_sure(factor, level)}).",
    ]


def _verdict(interaction: Spread, level: float) -> str:
    if interaction.n < 2:
        return "one seed shows no spread, so nothing is claimed."
    if not interaction.clear(level):
        return "no interference beyond the spread over seeds."
    return "they hurt one another." if interaction.mean > 0 else "they help one another."


def _sure(factor: Spread, level: float) -> str:
    if factor.n < 2:
        return ", no spread"
    return "" if factor.clear(level) else ", not told from it by the spread"


def _matrix(methods: Sequence[str], table: Trials) -> object:
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
            text = ""
            if sizes:
                accuracy = spread(accuracies).format(".2f", 100)
                text = f"{accuracy} %<br>{spread(sizes).format(',.0f')} bytes"
            texts[-1].append(text)
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
