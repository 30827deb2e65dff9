"""report.html of a sweep: its best trials, its analysis and charts, in one file without scripts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from trainer.report.html import figures, render
from trainer.report.table import Table
from trainer.report.text import significant
from trainer.sweeps import parameter_plots, plots
from trainer.sweeps.analysis import Answer
from trainer.sweeps.labels import format_measure, short_names
from trainer.sweeps.plots import Objective
from trainer.sweeps.study import reported_values

ENOUGH = 2  # completed trials that charts need


def page(study: optuna.Study, summary: Mapping[str, Any], answer: Answer) -> str:
    """Render the page; arguments as `trainer.sweeps.report.write_report`.

    Returns:
        HTML text.
    """
    return render(
        "report.html.j2",
        title=f"{summary['name']}/{summary['sweep']}",
        status=summary["status"],
        status_text=summary["status"],
        date=summary.get("date"),
        command=summary.get("command"),
        error=summary["error"],
        highlights=highlights(summary),
        best=best_table(summary),
        commands=[(t["number"], t["command"]) for t in summary["best"] if t["command"]],
        tables=answer.tables,
        answers=figures({caption: draw() for caption, draw in answer.figures.items()}),
        sentences=answer.sentences,
        sections=[(title, figures(svgs)) for title, svgs in charts(study).items()],
    )


def highlights(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main figures of the sweep, each with its label."""
    counts = summary["trials"]
    found = []
    if summary["best"]:
        (name, value), *_ = summary["best"][0]["values"].items()
        found.append((format_measure(name, value), f"best {name} (validation)"))
    found.append((f"{counts['complete']:,}", "trials complete"))
    found += [(f"{counts[key]:,}", f"trials {key}") for key in ("pruned", "failed", "unfinished")
              if counts[key]]  # fmt: skip
    found.append((f"{summary['epochs']:,}", "epochs in all"))
    if cost := summary.get("cost"):
        price = f"{significant(cost['price'], 3)} {cost['currency']}"
        found.append((price, f"for {1000 * cost['kwh']:.3g} Wh of energy, {cost['evidence']}"))
    return [*found, (f"{summary['seconds']:,.0f} s", "from start to end")]


def best_table(summary: Mapping[str, Any]) -> Table:
    """The best trials: objectives and drawn values; with several objectives, the Pareto front."""
    # Sorted, since the first trial may lack parameters that only exist for some values of others.
    names = sorted({name for trial in summary["best"] for name in trial["params"]})
    objectives = list(summary["objectives"])
    rows = [
        (
            str(trial["number"]),
            *(format_measure(name, trial["values"][name]) for name in objectives),
            *(significant(trial["params"].get(name, ""), 3) for name in names),
        )
        for trial in summary["best"]
    ]
    short = short_names(names)
    title = "Best trials (Pareto front)" if len(objectives) > 1 else "Best trials"
    return Table(title, ("trial", *objectives, *(short[name] for name in names)), rows)


def charts(study: optuna.Study) -> dict[str, dict[str, str]]:
    """All charts of a study as SVG: by section, and by caption."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(trials) < ENOUGH:
        return {}
    objectives = [
        Objective(index, name, direction == StudyDirection.MAXIMIZE)
        for index, (name, direction) in enumerate(
            zip(study.metric_names or ["value"], study.directions, strict=True)
        )
    ]
    found: dict[str, dict[str, str]] = {}
    front: list[FrozenTrial] = []
    if len(objectives) > 1:
        front = study.best_trials
        found["Trade-off between objectives"] = {
            f"{y.name} against {x.name}": plots.pareto(trials, front, x, y)
            for y, x in itertools.combinations(objectives, 2)
        }
    found["History"] = {f"{o.name} of each trial": plots.history(trials, o) for o in objectives}
    importances = plots.parameter_importances(study, objectives)
    names = plots.by_importance(importances)
    labels = short_names(names)
    if len(names) > 1:
        found["Importance of parameters"] = {
            "Importance of each parameter for good values of the objective (PED-ANOVA)":
                plots.importances(importances, labels)
        }  # fmt: skip
    found |= _by_parameter(trials, front, objectives, names, labels)
    ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    reported = [trial for trial in ended if reported_values(trial)]
    if reported:
        shown = plots.thin_out(reported, [])
        label = objectives[0].name if len(objectives) == 1 else "compared value"
        caption = "Values that the pruner compares after each epoch" + _of(shown, reported)
        found["Early stopping"] = {caption: plots.intermediate(shown, label)}
    return found


def _by_parameter(
    trials: Sequence[FrozenTrial],
    front: Sequence[FrozenTrial],
    objectives: Sequence[Objective],
    names: Sequence[str],
    labels: Mapping[str, str],
) -> dict[str, dict[str, str]]:
    """Slices and parallel coordinates.

    Args:
        names: parameters, the most important first.
    """
    slices, parallel = {}, {}
    everywhere = [name for name in names if all(name in trial.params for trial in trials)]
    for objective in objectives:
        ranked = objective.ranked(trials)
        best = list(front) or ranked[: max(1, len(ranked) // 10)]
        shown = plots.thin_out(trials, best)
        for index, name in enumerate(names[: plots.MAX_SLICES]):
            caption = f"{objective.name} against {labels[name]}"
            slices[caption] = parameter_plots.slices(
                shown, best, objective, name, labels[name], index
            )
        if len(everywhere) > 1:
            caption = f"All parameters and {objective.name}" + _of(shown, trials)
            parallel[caption] = parameter_plots.parallel(
                shown, objective, everywhere[: plots.MAX_AXES], labels
            )
    orange = "Pareto front" if front else "best 10%"
    found = {f"Objectives against parameters (orange: {orange})": slices}
    return found | ({"Parallel coordinates": parallel} if parallel else {})


def _of(shown: Sequence[FrozenTrial], trials: Sequence[FrozenTrial]) -> str:
    return f" ({len(shown)} of {len(trials)} trials)" if len(shown) < len(trials) else ""
