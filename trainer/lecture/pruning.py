"""The exhibits about pruning: accuracy against sparsity and size, sensitivity, interference."""

from collections.abc import Sequence

from trainer.lecture.charts import Line, Mark, curves
from trainer.lecture.compression import FEW_DIGITS
from trainer.lecture.exhibit import Exhibit, Job, Results
from trainer.report.table import Table
from trainer.sweeps.analysis import Answer, Row, interference, sensitivity
from trainer.sweeps.analysis.answer import Spread, spread

TOLERATED = 0.002  # loss of accuracy, as a fraction, that counts as none
_SPARSITY = "phases.prune.sparsity"
_EPOCHS = "phases.prune.fit.epochs"
_LENET300_BYTES = 4 * 266_610  # dense, fp32

_FEWER = (
    *FEW_DIGITS,
    *("phases.train.fit.epochs=1", "phases.prune.fit.epochs=1", "sweep.params.seed=choice(0)"),
)


def _pruning_sweep(name: str, *overrides: str) -> Job:
    """LeNet-300-100 pruned at once, with five epochs of retraining and without."""
    return Job(
        name,
        "tradeoff",
        (
            *overrides,
            "phases.share.enabled=false",
            f"sweep.params.{_SPARSITY}=choice(0.3,0.5,0.6,0.7,0.8,0.85,0.9,0.93,0.95,0.97,0.98)",
            f"+sweep.params.{_EPOCHS}=choice(0,5)",
        ),
        (
            *_FEWER,
            f"sweep.params.{_SPARSITY}=choice(0.5,0.95)",
            f"sweep.params.{_EPOCHS}=choice(0,1)",
        ),
    )


REGULARIZERS = {
    "L2": _pruning_sweep("pruning-l2"),
    "L1": _pruning_sweep("pruning-l1", "optimizer=sgd_l1", "optimizer.lr=0.05"),
}
ITERATIVE = tuple(
    Job(
        f"iterative-{seed}",
        "iterative_pruning",
        (f"seed={seed}",),
        (*FEW_DIGITS, "phases.train.fit.epochs=1", "phases.prune_50.fit.epochs=1"),
    )
    for seed in range(3)
)

_BYTES = ("+sweep.objectives.bytes=minimize", "artifact.make=true")
_BITS = "phases.share.bits"
SIZES = {
    "pruned": Job("size-pruned", "tradeoff", (*_BYTES, "phases.share.enabled=false"), _FEWER),
    "shared": Job(
        "size-shared",
        "tradeoff",
        (
            *_BYTES,
            f"sweep.params.{_SPARSITY}=choice(0)",
            "phases.prune.fit.epochs=0",
            f"+sweep.params.{_BITS}=choice(1,2,3,4,5,6)",
        ),
        (*_FEWER, "phases.prune.fit.epochs=0", f"sweep.params.{_BITS}=choice(2,5)"),
    ),
    "pruned and shared (5 bits)": Job("size-both", "tradeoff", _BYTES, _FEWER),
}

SENSITIVITY_SWEEP = Job(
    "sensitivity",
    "sensitivity",
    short=(
        *FEW_DIGITS,
        "phases.train.fit.epochs=1",
        "sweep.params.phases.prune.sparsity=choice(0,0.9)",
    ),
)
INTERFERENCE_SWEEP = Job(
    "interference",
    "interference",
    short=(
        *FEW_DIGITS,
        *(f"phases.{phase}.fit.epochs=1" for phase in ("train", "prune", "share", "quantize")),
        "sweep.params.seed=choice(0)",
        "sweep.params.phases.quantize.enabled=choice(true)",
    ),
)

_KEPT = {"fc1": "8%", "fc2": "9%", "fc3": "26%"}  # Han et al., NIPS 2015, table 3


def _means(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[Spread]]:
    """Accuracy by position: the positions in order, and the spread over the seeds at each."""
    found: dict[float, list[float]] = {}
    for x, accuracy in points:
        found.setdefault(x, []).append(accuracy)
    return sorted(found), [spread(found[x]) for x in sorted(found)]


def _pruned(rows: Sequence[Row], retrained: bool) -> list[tuple[float, float]]:
    """Sparsity and accuracy of the trials with or without retraining."""
    return [
        (float(row.settings[_SPARSITY]), row.measured["accuracy"])
        for row in rows
        if bool(row.settings[_EPOCHS]) == retrained
    ]


def _pruning(results: Results) -> Answer:
    runs = [results.summary(job)["phases"] for job in ITERATIVE]
    dense = spread([phases[0]["accuracy"] for phases in runs]).mean
    rounds = [
        (int(phase["name"].removeprefix("prune_")) / 100, phase["accuracy"])
        for phases in runs
        for phase in phases[1:]
    ]
    lines = []
    for retrained in (False, True):
        for colour, (name, job) in enumerate(REGULARIZERS.items(), 1):
            how = "retrained" if retrained else "not retrained"
            found = _means(_pruned(results.rows(job), retrained))
            lines.append(Line(f"{name}, {how}", *found, colour, dashed=not retrained))
    lines.append(Line("L2, iterative", *_means(rounds), 4))
    rows = []
    for line in lines:
        held = [x for x, y in zip(line.x, line.y, strict=True) if y.mean >= dense - TOLERATED]
        best = f"{max(held):.0%} ({1 / (1 - max(held)):.1f}x)" if held else "none"
        at = dict(zip(line.x, line.y, strict=True))
        shown = [at[x].format(".2f", 100) if x in at else "" for x in (0.8, 0.9, 0.95, 0.98)]
        rows.append((line.label, best, *shown))
    table = Table(
        "",
        ("regularization, retraining", "no loss up to", *(f"at {s}%" for s in (80, 90, 95, 98))),
        rows,
        f"accuracy in %, mean ± standard deviation over the seeds; no loss: within "
        f"{100 * TOLERATED:g} points of the dense {dense:.2%}",
    )
    marks = [
        Mark("published: 2x, not retrained", 1 - 1 / 2, colour=3),
        Mark("published: 9x, iterative", 1 - 1 / 9, colour=4),
    ]

    def draw() -> str:
        return curves(
            "pruning",
            lines,
            marks,
            x="weights removed",
            y="validation accuracy",
            percent="xy",
            bottom=dense - 0.05,
        )

    caption = (
        "Accuracy against sparsity, down to five points below the dense model. Dotted: AlexNet"
    )
    return Answer([table], {caption: draw})


def _size(results: Results) -> Answer:
    lines, rows = [], []
    for colour, (label, job) in enumerate(SIZES.items(), 1):
        groups: dict[tuple[object, object], list[Row]] = {}
        for row in results.rows(job):
            groups.setdefault((row.settings[_SPARSITY], row.settings.get(_BITS)), []).append(row)
        points = [
            (
                _LENET300_BYTES / spread([row.measured["bytes"] for row in group]).mean,
                spread([row.measured["accuracy"] for row in group]),
                sparsity,
                bits,
            )
            for (sparsity, bits), group in groups.items()
        ]
        points.sort(key=lambda point: point[0])
        lines.append(Line(label, [p[0] for p in points], [p[1] for p in points], colour))
        for ratio, accuracy, sparsity, bits in points:
            setting = f"{bits} bits" if bits else f"{sparsity:.0%} sparse"
            rows.append((label, setting, f"{ratio:.1f}x", accuracy.format(".2f", 100)))
    best = max(y.mean for line in lines for y in line.y)
    marks = [
        Mark("published: either alone, 8%", 100 / 8, colour=0),
        Mark("published: both, 3%", 100 / 3, colour=3),
    ]

    def draw() -> str:
        return curves(
            "size",
            lines,
            marks,
            x="times smaller than the dense fp32 weights",
            y="validation accuracy",
            percent="y",
            log="x",
            bottom=best - 0.05,
            ratio=True,
        )

    table = Table(
        "",
        ("method", "setting", "ratio", "accuracy %"),
        rows,
        "ratio: of model.dcz; accuracy: mean ± standard deviation over the seeds",
    )
    caption = "Accuracy against compression ratio. Dotted: where AlexNet's accuracy begins to fall"
    return Answer([table], {caption: draw})


def _sensitivity(results: Results) -> Answer:
    answer = sensitivity(results.rows(SENSITIVITY_SWEEP))
    published = [(layer, kept) for layer, kept in _KEPT.items()]
    answer.tables.append(
        Table("Published: weights kept of LeNet-300-100", ("layer", "kept"), published)
    )
    return answer


PRUNING = Exhibit(
    "pruning",
    "Accuracy against sparsity",
    "LeNet-300-100 pruned by magnitude: trained with an L1 or an L2 penalty, with five epochs of "
    "retraining and without, at once and in rounds.",
    "Han et al., NIPS 2015, figure 5 and section 5, of AlexNet: no loss up to 2x without "
    "retraining and 9x with iterative retraining; L2 is better than L1 once the survivors are "
    "retrained",
    20,
    _pruning,
    (*REGULARIZERS.values(), *ITERATIVE),
)
SIZE = Exhibit(
    "size",
    "Accuracy against compression ratio",
    "LeNet-300-100 pruned, shared, or both: each removes what the other leaves.",
    "Han, Mao & Dally, ICLR 2016, figure 6, of AlexNet: alone, accuracy falls below 8% of the "
    "size; together, at 3% it has not fallen",
    15,
    _size,
    tuple(SIZES.values()),
)
SENSITIVITY = Exhibit(
    "sensitivity",
    "Sensitivity of each layer",
    "Each layer of LeNet-300-100 is pruned alone, with and without an epoch of retraining.",
    "Han et al., NIPS 2015, figure 6 and table 3: the last layer keeps the most",
    10,
    _sensitivity,
    (SENSITIVITY_SWEEP,),
)
INTERFERENCE = Exhibit(
    "interference",
    "Do methods interfere with one another?",
    "Pruning, sharing and quantization in every combination, from one baseline for each seed.",
    "a question of the lecture; Han et al. find that pruning does not hurt sharing",
    25,
    lambda results: interference(results.rows(INTERFERENCE_SWEEP)),
    (INTERFERENCE_SWEEP,),
)
