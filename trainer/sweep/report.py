"""report.html: the plots of a study in one file that needs nothing else."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from jinja2 import Environment, PackageLoader
from optuna.trial import TrialState

from trainer.sweep.analysis import Answer

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
    pages = Environment(loader=PackageLoader("trainer.sweep", "."), autoescape=True)
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

        def value(trial: optuna.trial.FrozenTrial, i: int = i) -> float:
            return float(trial.values[i])

        target: dict[str, Any] = {"target": value, "target_name": name} if len(names) > 1 else {}
        drawn: dict[str, Callable[..., Any]] = {
            "history": plot.plot_optimization_history,
            "importances": plot.plot_param_importances,
            "parallel coordinates": plot.plot_parallel_coordinate,
            "slices": plot.plot_slice,
        }
        for title, make in drawn.items():
            plots[f"{name}: {title}"] = make(study, **target)
    plots["values at each epoch"] = plot.plot_intermediate_values(watched)
    return plots
