"""The results of a sweep: trials.csv, summary.json, report.html, and a table of the best trials."""

import csv
import io
import os
import re
import shlex
from collections.abc import Iterable
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from trainer.report.cost import cost_line, training_cost
from trainer.report.table import Table, as_dict, rich_table
from trainer.store.directory import RunDirectory
from trainer.sweeps.analysis import ANALYSES, Answer, Row
from trainer.sweeps.labels import format_measure, format_settings
from trainer.sweeps.measures import MEASURES, parse_constraints
from trainer.sweeps.plan import Plan
from trainer.sweeps.report import write_report
from trainer.sweeps.show import LiveTable, tally
from trainer.sweeps.study import RESULT, USAGE, SweepStudy, reported_values

# Overrides that do not affect a trial that is run alone.
_OF_THE_SWEEP = re.compile(r"(~|\+{0,2}(?=[^=]*=))(sweep[.=]|hydra\.)")
SHOWN = 10  # rows of the table in the terminal, and trials in summary.json


class Results:
    """Writes the results so far, at any time."""

    def __init__(self, plan: Plan, study: SweepStudy, directory: RunDirectory) -> None:
        self._plan, self._study, self._directory = plan, study, directory
        self._answer = Answer()
        self._objectives = list(plan.cfg.sweep.objectives)
        self._bounds = parse_constraints(plan.cfg.sweep)

    def write(self, status: str, error: str | None, seconds: float, *, report: bool = True) -> None:
        """Write all files; the summary first, since the others may fail.

        Args:
            status: done, failed or interrupted.
            seconds: duration of all sessions.
            report: whether to write the report as well, whose charts take seconds.
        """
        summary = self.summary(status, error, seconds)
        self._directory.write_summary(summary)
        self._write_csv()
        self._answer = self._analyse()
        summary["analysis"] = {
            "sentences": self._answer.sentences,
            "tables": [as_dict(table) for table in self._answer.tables],
        }
        self._directory.write_summary(summary)
        if report:
            path = self._directory.path / "report.html"
            write_report(path, self._study.study, summary, self._answer)

    def show(self, live: LiveTable) -> None:
        """Print the best trials, and the conclusions of the analysis."""
        for table in (*self._answer.tables, self.table()):
            live.terminal.print(rich_table(table, live.terminal.width))
        for sentence in self._answer.sentences:
            live.say(sentence, wrapped=True)
        if cost := self._cost(self._study.trials()):
            live.say(f"cost of all trials: {cost_line(cost)}", wrapped=True)
        if missed := self._none_feasible():
            live.say(missed, wrapped=True)

    def _none_feasible(self) -> str | None:
        """A sentence about the trial closest to the constraints; None: some trials meet them.

        Several constraints are compared by the excess relative to the bound.
        """
        done = self._study.trials(TrialState.COMPLETE)
        if not done or self._study.best():
            return None
        bounds = {k: abs(float(b.right)) or 1.0 for k, b in self._bounds.items()}
        closest = min(done, key=lambda t: max(t.constraints[k] / bounds[k] for k in bounds))
        missed = " and ".join(
            f"{name} by {closest.constraints[name]:.6g}"
            for name in bounds
            if closest.constraints[name] > 0
        )
        return (
            f"no trial meets sweep.constraints; the closest is trial {closest.number}, "
            f"which misses {missed}"
        )

    def _analyse(self) -> Answer:
        """The conclusions from all completed trials, if `sweep.analysis` asks for them."""
        wanted = self._plan.cfg.sweep.analysis
        if wanted is None:
            return Answer()
        rows = [
            Row(self._plan.space.settings(trial.params), trial.user_attrs[RESULT])
            for trial in self._study.trials()
            if trial.state == TrialState.COMPLETE
        ]
        return ANALYSES[wanted].answer(rows)

    def summary(self, status: str, error: str | None, seconds: float) -> dict[str, Any]:
        """The content of summary.json."""
        cfg = self._plan.cfg
        arguments = self._directory.read_command()
        trials, counts = self._study.trials(), self._study.counts
        starts = [trial.datetime_start for trial in trials if trial.datetime_start]
        return {
            "name": cfg.name,
            "sweep": cfg.sweep.name,
            "date": f"{min(starts):%Y-%m-%d %H:%M:%S}" if starts else None,
            "command": None if arguments is None else _as_command(arguments),
            "seed": cfg.seed,
            "precision": cfg.precision,
            "workers": cfg.cluster.workers,
            "status": status,
            "error": error,
            "seconds": round(seconds, 3),
            "epochs": self._study.epochs,
            "objectives": dict(cfg.sweep.objectives),
            "trials": {
                "complete": counts.get(TrialState.COMPLETE, 0),
                "pruned": counts.get(TrialState.PRUNED, 0),
                "failed": counts.get(TrialState.FAIL, 0),
                "unfinished": counts.get(TrialState.RUNNING, 0),
            },
            "cost": self._cost(trials),
            "best": [self._entry(trial) for trial in self._study.best()[:SHOWN]],
        }

    def table(self) -> Table:
        """The best trials, or the Pareto front."""
        what = "Pareto front" if len(self._objectives) > 1 else "best trials"
        rows = [
            (
                str(trial.number),
                *map(format_measure, self._objectives, trial.values),
                format_settings(trial.params),
            )
            for trial in self._study.best()[:SHOWN]
        ]
        return Table(
            f"{what}: {tally(self._study.counts)}",
            ("trial", *self._objectives, "settings"),
            rows,
            prose=("settings",),
        )

    def _entry(self, trial: FrozenTrial) -> dict[str, Any]:
        overrides = self._plan.overrides(trial.params)
        return {
            "number": trial.number,
            "values": dict(zip(self._objectives, trial.values, strict=True)),
            "measures": trial.user_attrs[RESULT],
            "cost": self._cost([trial]),
            "params": self._plan.space.values(trial.params),
            "overrides": overrides,
            "command": self._command(overrides),
        }

    def _cost(self, trials: Iterable[FrozenTrial]) -> dict[str, Any] | None:
        """The cost of trials in any state, as far as known; phases that they share count once."""
        usages = [of for trial in trials for of in trial.user_attrs.get(USAGE, {}).values()]
        return training_cost(usages, self._plan.cfg.cost)

    def _command(self, overrides: list[str] | None) -> str | None:
        """The command that runs a trial again.

        Returns:
            None if the sweep was started from Python, or no command line can express the trial.
        """
        arguments = self._directory.read_command()
        if arguments is None or overrides is None:
            return None
        mine = [argument for argument in arguments if not _OF_THE_SWEEP.match(argument)]
        return _as_command([*mine, *overrides, "~sweep.params"])

    def _write_csv(self) -> None:
        names = [parameter.name for parameter in self._plan.space.parameters]
        measures = list(dict.fromkeys([*MEASURES, *self._plan.directions]))
        out = io.StringIO()
        rows = csv.writer(out, lineterminator="\n")
        ends = ["kwh", "failures", "reason"]
        rows.writerow(["number", "state", "epochs", *measures, *names, *ends])
        for trial in self._study.trials():
            measured = trial.user_attrs.get(RESULT, {})
            drawn = self._plan.space.values(trial.params)
            rows.writerow(
                [
                    trial.number,
                    "UNFINISHED" if trial.state == TrialState.RUNNING else trial.state.name,
                    len(reported_values(trial)),
                    *(measured.get(name, "") for name in measures),
                    *(drawn.get(name, "") for name in names),
                    f"{cost['kwh']:.6g}" if (cost := self._cost([trial])) else "",
                    len(trial.user_attrs.get("failures", [])),
                    trial.user_attrs.get("reason", ""),
                ]
            )
        aside = self._directory.path / "trials.csv.part"
        aside.write_text(out.getvalue(), encoding="utf-8")
        os.replace(aside, self._directory.path / "trials.csv")


def _as_command(arguments: list[str]) -> str:
    return shlex.join(["python", "-m", "trainer", *arguments])
