"""How much sparsity each layer bears, with retraining and without: one layer pruned at a time."""

from collections.abc import Mapping, Sequence

from trainer.report.sheets import Sheet
from trainer.sweep.analysis.answer import Answer, Row

BEARABLE = 0.005  # drop of accuracy, a fraction, for the table

Curve = list[tuple[float, float]]
"""Sparsity and accuracy on validation data, by sparsity."""


def sensitivity(rows: Sequence[Row]) -> Answer:
    """Accuracy against sparsity for each layer (Han et al., NIPS 2015, figure 6).

    The trials search a phase's `include` (one layer), `sparsity` and `fit.epochs` (0: without
    retraining). Several trials of one place, of other seeds, are averaged.
    """
    curves = _curves(rows)
    if not curves:
        return Answer()
    layers = list(dict.fromkeys(layer for layer, _ in curves))
    best = max(accuracy for curve in curves.values() for _, accuracy in curve)
    lines = []
    for layer in layers:
        borne = [_borne(curves.get((layer, retrained), []), best) for retrained in (False, True)]
        lines.append((layer, *borne))
    sheet = Sheet(
        f"largest sparsity tried within {100 * BEARABLE:g} points of the best accuracy, {best:.2%}",
        ("layer", "without retraining", "with retraining"),
        lines,
        "each layer pruned alone; validation data",
    )
    return Answer([sheet], {"accuracy against sparsity, layer by layer": _figure(curves, layers)})


def _curves(rows: Sequence[Row]) -> dict[tuple[str, bool], Curve]:
    """By layer, and by whether it was trained again."""
    found: dict[tuple[str, bool], dict[float, list[float]]] = {}
    for row in rows:
        layer = _setting(row.settings, ".include")
        sparsity = _setting(row.settings, ".sparsity")
        retrained = bool(_setting(row.settings, ".fit.epochs"))
        name = ", ".join(map(str, layer)) if isinstance(layer, list | tuple) else str(layer)
        places = found.setdefault((name, retrained), {})
        places.setdefault(float(str(sparsity)), []).append(row.measured["accuracy"])
    return {
        key: sorted((sparsity, sum(a) / len(a)) for sparsity, a in places.items())
        for key, places in found.items()
    }


def _setting(settings: Mapping[str, object], ending: str) -> object:
    return next((value for key, value in settings.items() if key.endswith(ending)), None)


def _borne(curve: Curve, best: float) -> str:
    """The largest sparsity before the first that costs too much."""
    most: float | None = None
    for sparsity, accuracy in curve:
        if accuracy < best - BEARABLE - 1e-12:
            break
        most = sparsity
    return "none" if most is None else f"{most:.1%}"


def _figure(curves: Mapping[tuple[str, bool], Curve], layers: Sequence[str]) -> object:
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
    figure.update_xaxes(title="sparsity of the layer, %")
    figure.update_yaxes(title="accuracy on validation data, %")
    return figure
