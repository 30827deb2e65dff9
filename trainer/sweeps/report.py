"""report.html: the plots of a study in one file that needs nothing else."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from jinja2 import Environment, PackageLoader
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trainer.sweeps.analysis import Answer

ENOUGH = 2  # completed trials before there is anything to plot


def write_report(
    path: Path,
    study: optuna.Study,
    watched: optuna.Study,
    summary: Mapping[str, Any],
    answer: Answer,
) -> None:
    """Write the plots, the analysis and the best trials of `summary` (summary.json) to `path`.

    Args:
        watched: the study whose intermediate values pruners compare.
    """
    from plotly.offline import get_plotlyjs

    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that few trials make inaccurate plots is plain to see
        plots = answer.figures | (_plots(study, watched) if len(done) >= ENOUGH else {})
    pages = Environment(loader=PackageLoader("trainer.sweeps", "."), autoescape=True)
    text = pages.get_template("report.html.jinja").render(
        summary=summary,
        plots={title: figure.to_html(full_html=False, include_plotlyjs=False)
               for title, figure in plots.items()},
        script=get_plotlyjs() if plots else "",
    )  # fmt: skip
    aside = path.with_name(f"{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def _plots(study: optuna.Study, watched: optuna.Study) -> dict[str, Any]:
    from optuna import visualization as plot

    names = study.metric_names or ["value"]
    plots: dict[str, Any] = {}
    if len(names) in (2, 3) and study.best_trials:
        plots["Pareto front"] = plot.plot_pareto_front(study)
    for i, name in enumerate(names):
        up = study.directions[i] == StudyDirection.MAXIMIZE
        target, good_when_low = _values(i, name, 1), _values(i, name, -1 if up else 1)
        only = len(names) == 1  # whose values and direction Optuna takes by itself
        drawn: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
            "history": (plot.plot_optimization_history, target),
            # Of what makes a target low.
            "importances": (plot.plot_param_importances, good_when_low),
            "parallel coordinates": (plot.plot_parallel_coordinate, target),
            "slices": (plot.plot_slice, target),
        }
        for title, (make, which) in drawn.items():
            plots[f"{name}: {title}"] = make(study, **({} if only else which))
    plots["values at each epoch"] = plot.plot_intermediate_values(watched)
    return plots


def _values(objective: int, name: str, sign: int) -> dict[str, Any]:
    """Arguments of a plot: one objective of a trial, perhaps with the sign turned."""

    def value(trial: FrozenTrial) -> float:
        return sign * float(trial.values[objective])

    return {"target": value, "target_name": name}
