"""The analysis `sensitivity`: how much sparsity each layer tolerates, with and without retraining.

The sweep prunes one layer at a time (Han et al., NIPS 2015, figure 6).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

from trainer.errors import ConfigError
from trainer.report.table import Table
from trainer.sweeps.analysis.answer import Answer, Row
from trainer.sweeps.analysis.parameters import check_parameters
from trainer.sweeps.space import Space

PARTS = ("include", "sparsity", "fit.epochs")  # the settings of one phase that trials differ in
TOLERATED = 0.005  # accuracy lost, a fraction, up to which a sparsity counts as tolerated
_TOGETHER = 5  # layers up to which one chart shows all of them

Curve = list[tuple[float, float]]
"""Sparsity and accuracy on validation data, by sparsity."""
Curves = Mapping[tuple[str, bool], Curve]
"""By layer, and by whether it was retrained."""


def check(space: Space, measured: Collection[str]) -> None:
    """Refuse a sweep that does not vary layer, sparsity and epochs of one phase.

    Raises:
        ConfigError: The message names what is missing.
    """
    searched = {parameter.key: parameter.range for parameter in space.parameters}
    keys = _keys(searched)
    missing = [key for key in keys if key not in searched]
    if missing:
        raise ConfigError(
            f"sweep.analysis=sensitivity: sweep.params does not search {', '.join(missing)}; it "
            "needs include (one layer), sparsity and fit.epochs of one phase"
        )
    check_parameters("sensitivity", space, keys)
    for key, what in zip(keys[1:], ("the dense model", "without retraining"), strict=True):
        if 0 not in (searched[key].all() or []):
            raise ConfigError(
                f"sweep.analysis=sensitivity: sweep.params.{key} must have 0 among its values: "
                f"{what}, which the other trials are compared with"
            )


def sensitivity(rows: Sequence[Row]) -> Answer:
    """Accuracy against sparsity for each layer.

    The trials search a phase's `include` (one layer), `sparsity` (0: dense) and `fit.epochs` (0:
    without retraining). All are compared with the dense model that was not retrained. Trials that
    differ only in the seed are averaged.

    Returns:
        An empty answer as long as there is no trial of the dense model.
    """
    curves = _curves(rows)
    dense = [
        accuracy
        for (_, retrained), curve in curves.items()
        for sparsity, accuracy in curve
        if sparsity == 0 and not retrained
    ]
    if not dense:
        return Answer()
    layers = list(dict.fromkeys(layer for layer, _ in curves))
    before = sum(dense) / len(dense)
    lines = []
    for layer in layers:
        found = [_tolerated(curves.get((layer, again), []), before) for again in (False, True)]
        lines.append((layer, *found))
    table = Table(
        f"Largest sparsity tried within {100 * TOLERATED:g} points of the dense {before:.2%}",
        ("layer", "without retraining", "with retraining"),
        lines,
        "each layer pruned alone; accuracy on validation data",
    )
    return Answer([table], _figures(curves, layers, before))


def _keys(searched: Iterable[str]) -> list[str]:
    """The keys of `PARTS` in the phase with the largest number of them among `searched`."""
    searched = list(searched)
    phases = [".".join(key.split(".")[:2]) for key in searched if key.startswith("phases.")]
    each = [[f"{phase}.{part}" for part in PARTS] for phase in [*phases, "phases.prune"]]
    return max(each, key=lambda keys: sum(key in searched for key in keys))


def _curves(rows: Sequence[Row]) -> Curves:
    found: dict[tuple[str, bool], dict[float, list[float]]] = {}
    for row in rows:
        layer, sparsity, epochs = (row.settings[key] for key in _keys(row.settings))
        name = ", ".join(map(str, layer)) if isinstance(layer, list | tuple) else str(layer)
        places = found.setdefault((name, bool(epochs)), {})
        places.setdefault(float(sparsity), []).append(row.measured["accuracy"])
    return {
        key: sorted((sparsity, sum(a) / len(a)) for sparsity, a in places.items())
        for key, places in found.items()
    }


def _tolerated(curve: Curve, dense: float) -> str:
    """The largest sparsity before the first that loses too much accuracy."""
    largest = 0.0
    for sparsity, accuracy in curve:
        if accuracy < dense - TOLERATED - 1e-12:
            break
        largest = sparsity
    return f"{largest:.1%}" if largest else "none"


def _figures(curves: Curves, layers: Sequence[str], dense: float) -> dict[str, Callable[[], str]]:
    """One chart of all layers, or one for each if there are many."""
    caption = (
        "Accuracy against the sparsity of {}. "
        "Dashed: only pruned; solid: retrained; dotted: the dense model"
    )
    if len(layers) <= _TOGETHER:
        return {caption.format("one layer"): partial(_figure, curves, layers, dense, 0)}
    return {
        caption.format(layer): partial(_figure, curves, [layer], dense, index)
        for index, layer in enumerate(layers)
    }


def _figure(curves: Curves, layers: Sequence[str], dense: float, index: int) -> str:
    from trainer.sweeps.analysis.plots import sensitivity_curves  # matplotlib is slow to import

    return sensitivity_curves(curves, layers, dense, index)
