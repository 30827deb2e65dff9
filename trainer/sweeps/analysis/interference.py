"""Do compression methods interfere with one another when they are combined?

The sweep runs every combination of phases (`phases.NAME.enabled`) with several seeds. Each seed has
its own baseline, the trial without any of the methods; changes are relative to it.
A change of accuracy is in percentage points, and negative means worse.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from itertools import combinations

from trainer.errors import ConfigError
from trainer.report.table import Table
from trainer.sweeps.analysis.answer import Answer, Row, Spread, spread
from trainer.sweeps.analysis.parameters import check_parameters
from trainer.sweeps.space import Space

LEVEL = 0.05  # probability that any of the conclusions claims an effect that is chance

_PHASES, _ENABLED = "phases.", ".enabled"

Combination = frozenset[str]
Trials = Mapping[int, Mapping[Combination, Row]]
"""Trials by seed, and by the methods that they use."""


def check(space: Space, measured: Collection[str]) -> None:
    """Refuse a sweep that does not combine phases, or does not measure bytes.

    Raises:
        ConfigError: The message names what is missing.
    """
    keys = [parameter.key for parameter in space.parameters]
    methods = _methods(keys)
    if len(methods) < 2:
        raise ConfigError(
            "sweep.analysis=interference: sweep.params must search phases.NAME.enabled of two "
            f"phases or more, each choice(true,false); it searches {', '.join(keys)}"
        )
    check_parameters("interference", space, [f"{_PHASES}{m}{_ENABLED}" for m in methods])
    if "bytes" not in measured:
        raise ConfigError(
            "sweep.analysis=interference: it compares bytes, which this sweep does not measure; "
            "add bytes: minimize to sweep.objectives"
        )


def interference(rows: Sequence[Row]) -> Answer:
    """A table of all combinations, and conclusions about each pair of methods and all together."""
    methods = _methods(key for row in rows for key in row.settings)
    trials = _by_seed(rows, methods)
    every = [frozenset(c) for n in range(len(methods) + 1) for c in combinations(methods, n)]
    caption = (
        "Change of accuracy in percentage points (negative: worse), accuracy on validation data, "
        "and bytes. Diagonal: one method alone. Elsewhere: two methods together"
    )
    answer = Answer([_table(every, methods, trials)], sentences=sentences(rows))
    answer.figures[caption] = partial(_matrix, methods, trials)
    return answer


def sentences(rows: Sequence[Row]) -> list[str]:
    """Two conclusions for each pair of methods, and for all methods if there are more than two.

    The first one is about accuracy: the interaction is the change by all methods together, minus
    the sum of the changes by each alone. The second one is about bytes: the compression ratio
    together, divided by the product of the ratios of each alone.

    A sentence claims an interaction only if its mean over the seeds is significant by Student's
    t test. As there are several tests, each uses `LEVEL` divided by their number (Bonferroni's
    correction). Groups with missing trials are left out.
    """
    methods = _methods(key for row in rows for key in row.settings)
    trials = _by_seed(rows, methods)
    groups: list[tuple[str, ...]] = [*combinations(methods, 2)]
    if len(methods) > 2:
        groups.append(tuple(methods))
    complete = {group: _complete(group, trials) for group in groups}
    used = [group for group in groups if complete[group]]
    level = LEVEL / max(1, 2 * len(used))
    return [text for group in used for text in _sentences(group, complete[group], level)]


def _methods(keys: Iterable[str]) -> list[str]:
    """The phases that are disabled in some trials, in order."""
    found = dict.fromkeys(k for k in keys if k.startswith(_PHASES) and k.endswith(_ENABLED))
    return [key.removeprefix(_PHASES).removesuffix(_ENABLED) for key in found]


def _by_seed(rows: Sequence[Row], methods: Sequence[str]) -> Trials:
    trials: dict[int, dict[Combination, Row]] = {}
    for row in rows:
        used = frozenset(m for m in methods if row.settings[f"{_PHASES}{m}{_ENABLED}"])
        trials.setdefault(int(row.settings.get("seed", 0)), {})[used] = row
    return trials


def _changes(used: Combination, trials: Trials) -> list[float]:
    """Change of accuracy from the seed's baseline, in points, for each seed that has both."""
    return [
        100 * (of_seed[used].measured["accuracy"] - of_seed[frozenset()].measured["accuracy"])
        for of_seed in trials.values()
        if used in of_seed and frozenset() in of_seed
    ]


def _measured(used: Combination, trials: Trials, measure: str) -> list[float]:
    return [of_seed[used].measured[measure] for of_seed in trials.values() if used in of_seed]


def _ratios(used: Combination, trials: Trials) -> list[float]:
    """The size of the baseline's file divided by the trial's, for each seed that has both."""
    return [
        of_seed[frozenset()].measured["bytes"] / of_seed[used].measured["bytes"]
        for of_seed in trials.values()
        if used in of_seed and frozenset() in of_seed
    ]


def _table(every: Sequence[Combination], methods: Sequence[str], trials: Trials) -> Table:
    rows = []
    for used in every:
        accuracies = _measured(used, trials, "accuracy")
        if not accuracies:
            continue
        changes, ratios = _changes(used, trials), _ratios(used, trials)
        rows.append(
            (
                _name(used, methods),
                spread(accuracies).format(".2f", 100),
                spread(changes).format("+.2f") if used and changes else "",
                spread(_measured(used, trials, "bytes")).format(",.0f"),
                f"{spread(ratios).format('.1f')}x" if used and ratios else "",
                str(len(accuracies)),
            )
        )
    return Table(
        "Every combination of methods",
        ("methods", "accuracy %", "accuracy change", "bytes", "smaller", "n"),
        rows,
        "mean ± standard deviation over n seeds; accuracy on validation data; accuracy change: "
        "percentage points from the same seed without any method, negative is worse; bytes of "
        "model.dcz",
        optional=("n", "smaller"),
    )


def _name(used: Combination, methods: Sequence[str]) -> str:
    return " + ".join(m for m in methods if m in used) or "none"


def _complete(methods: tuple[str, ...], trials: Trials) -> Trials:
    """The seeds that have the baseline, each of the methods alone, and all of them together."""
    needed = {frozenset(), frozenset(methods), *(frozenset({method}) for method in methods)}
    return {seed: of_seed for seed, of_seed in trials.items() if needed <= of_seed.keys()}


def _sentences(methods: tuple[str, ...], complete: Trials, level: float) -> list[str]:
    """The conclusions about some methods used together: accuracy, then bytes."""
    alone = [frozenset({method}) for method in methods]
    together = frozenset(methods)
    parts = [_changes(used, complete) for used in alone]
    both = _changes(together, complete)
    interaction = spread([b - sum(p) for b, *p in zip(both, *parts, strict=True)])
    ratios = [_ratios(used, complete) for used in alone]
    both_ratios = _ratios(together, complete)
    factor = spread(
        [math.log(b / math.prod(p)) for b, *p in zip(both_ratios, *ratios, strict=True)]
    )
    names = f"{', '.join(methods[:-1])} and {methods[-1]}"
    apart = " and ".join(f"{spread(p).mean:+.2f}" for p in parts)
    return [
        f"{names}, accuracy: {_verdict(interaction, level)} Together {spread(both).mean:+.2f} "
        f"points, alone {apart} (interaction {interaction.format('+.2f')}, n = {interaction.n}).",
        f"{names}, bytes: together {spread(both_ratios).mean:.1f} times smaller, "
        f"{math.exp(factor.mean):.2f} of the product of the separate ratios "
        f"(n = {factor.n}, {_significance(factor, level)}).",
    ]


def _verdict(interaction: Spread, level: float) -> str:
    if interaction.n < 2:
        return "one seed allows no conclusion."
    if not interaction.is_significant(level):
        return "no significant interference."
    return "they hurt one another." if interaction.mean < 0 else "they help one another."


def _significance(factor: Spread, level: float) -> str:
    if factor.n < 2:
        return "one seed allows no conclusion"
    return "significant" if factor.is_significant(level) else "not significant"


def _matrix(methods: Sequence[str], trials: Trials) -> str:
    """Draw a cell for each method alone (on the diagonal) and for each pair."""
    from trainer.sweeps.analysis.plots import Cell, matrix  # matplotlib is slow to import

    cells = {}
    for row, first in enumerate(methods):
        for column, second in enumerate(methods):
            used = frozenset({first, second})
            if changes := _changes(used, trials):
                means = [spread(_measured(used, trials, m)).mean for m in ("accuracy", "bytes")]
                cells[row, column] = Cell(spread(changes).mean, *means)
    return matrix(methods, cells)
