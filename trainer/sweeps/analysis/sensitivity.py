"""How much sparsity each layer bears, with retraining and without: one layer pruned at a time."""

from collections.abc import Collection, Iterable, Mapping, Sequence

from trainer.errors import ConfigError
from trainer.report.tables import Table
from trainer.sweeps.analysis.answer import Answer, Row
from trainer.sweeps.analysis.searched import check_searched
from trainer.sweeps.space import Space

PARTS = ("include", "sparsity", "fit.epochs")  # of one phase: what the trials differ in
BEARABLE = 0.005  # drop of accuracy, a fraction, for the table

Curve = list[tuple[float, float]]
"""Sparsity and accuracy on validation data, by sparsity."""


def check(space: Space, measured: Collection[str]) -> None:
    """Refuse a sweep that cannot say what a layer bears. Raises ConfigError."""
    searched = {parameter.key: parameter.range for parameter in space.parameters}
    keys = _keys(searched)
    missing = [key for key in keys if key not in searched]
    if missing:
        raise ConfigError(
            f"sweep.analysis=sensitivity: sweep.params does not search {', '.join(missing)}; it "
            "needs include (one layer), sparsity and fit.epochs of one phase"
        )
    check_searched("sensitivity", space, keys)
    for key, what in zip(keys[1:], ("the dense model", "without retraining"), strict=True):
        if 0 not in (searched[key].all() or []):
            raise ConfigError(
                f"sweep.analysis=sensitivity: sweep.params.{key} must have 0 among its values: "
                f"{what}, which the others are held against"
            )


def sensitivity(rows: Sequence[Row]) -> Answer:
    """Accuracy against sparsity for each layer (Han et al., NIPS 2015, figure 6).

    The trials search a phase's `include` (one layer), `sparsity` (0: dense) and `fit.epochs` (0:
    without retraining). All are judged against the dense model that was not trained again.
    Several trials of one place, of other seeds, are averaged. Nothing is said while no trial of
    the dense model is there.
    """
    curves = _curves(rows)
    dense = [
        accuracy
        for (_, again), curve in curves.items()
        for sparsity, accuracy in curve
        if sparsity == 0 and not again
    ]
    if not dense:
        return Answer()
    layers = list(dict.fromkeys(layer for layer, _ in curves))
    before = sum(dense) / len(dense)
    lines = []
    for layer in layers:
        borne = [_borne(curves.get((layer, again), []), before) for again in (False, True)]
        lines.append((layer, *borne))
    table = Table(
        f"largest sparsity tried within {100 * BEARABLE:g} points of the dense {before:.2%}",
        ("layer", "without retraining", "with retraining"),
        lines,
        "each layer pruned alone; validation data",
    )
    figure = _figure(curves, layers, before)
    return Answer([table], {"accuracy against sparsity, layer by layer": figure})


def _keys(searched: Iterable[str]) -> list[str]:
    """The keys of `PARTS` in the phase of which most are searched."""
    searched = list(searched)
    phases = [".".join(key.split(".")[:2]) for key in searched if key.startswith("phases.")]
    each = [[f"{phase}.{part}" for part in PARTS] for phase in [*phases, "phases.prune"]]
    return max(each, key=lambda keys: sum(key in searched for key in keys))


def _curves(rows: Sequence[Row]) -> dict[tuple[str, bool], Curve]:
    """By layer, and by whether it was trained again."""
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


def _borne(curve: Curve, dense: float) -> str:
    """The largest sparsity before the first that costs too much."""
    most = 0.0
    for sparsity, accuracy in curve:
        if accuracy < dense - BEARABLE - 1e-12:
            break
        most = sparsity
    return f"{most:.1%}" if most else "none"


def _figure(
    curves: Mapping[tuple[str, bool], Curve], layers: Sequence[str], dense: float
) -> object:
    from plotly import graph_objects
    from plotly.colors import qualitative

    figure = graph_objects.Figure()
    for number, layer in enumerate(layers):
        color = qualitative.D3[number % len(qualitative.D3)]
        for retrained, dash in ((False, "dash"), (True, "solid")):
            curve = curves.get((layer, retrained), [])
            figure.add_scatter(
                x=[100 * sparsity for sparsity, _ in curve],
                y=[100 * accuracy for _, accuracy in curve],
                name=f"{layer}, {'retrained' if retrained else 'only pruned'}",
                line={"color": color, "dash": dash},
                mode="lines+markers",
            )
    figure.add_hline(y=100 * dense, line={"dash": "dot"}, annotation_text="dense")
    figure.update_xaxes(title="sparsity of the layer, %")
    figure.update_yaxes(title="accuracy on validation data, %")
    return figure
