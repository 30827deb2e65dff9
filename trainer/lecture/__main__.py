"""The lecture, reproduced: every figure and table from runs, beside the published values.

    python -m trainer.lecture                        all exhibits; hours
    python -m trainer.lecture --list                 the exhibits, and how long each takes
    python -m trainer.lecture --only huffman,eie     some of them
    python -m trainer.lecture --short                every exhibit, shrunk: does it work?

The results are kept in a folder (`--out`, by default outputs/lecture, or outputs/lecture-short):
the same command continues after an interruption, and runs nothing twice. After each exhibit it
writes lecture.html there, which shows all results so far. Settings (`key=value`) apply to every
run, such as cluster.address=HOST:PORT.

Exit codes: 0 done, 1 an exhibit failed, 2 wrong arguments, 130 and 143 interrupted.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.__main__ import DONE, LIMITS
from trainer.__main__ import main as run_command
from trainer.config.compose import compose_config
from trainer.errors import ConfigError, Interrupted, RunError, first_line
from trainer.lecture import EXHIBITS, Exhibit, Job, Results
from trainer.lecture.page import page
from trainer.library.subject_command import exit_code, show
from trainer.report.table import Table
from trainer.signals import Signals
from trainer.store.files import atomic_write

_NEEDED = "it needs the images of CIFAR-10, which do not ship: give --cifar10 DIR (see --help)"


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    options = _parser().parse_intermixed_args(arguments)
    lecture = _Lecture(options, shlex.join(["python", "-m", "trainer.lecture", *arguments]))
    try:
        return exit_code("trainer.lecture", lecture.list_exhibits if options.list else lecture.run)
    except Interrupted as error:
        print(f"{error}; the same command continues", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.lecture",
        description="Every figure and table of the lecture from runs, beside the published values.",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    parser.add_argument("--list", action="store_true", help="list the exhibits and their durations")
    parser.add_argument("--only", metavar="NAME,...", help="exhibits to run; the page has all")
    parser.add_argument("--short", action="store_true", help="shrink every run to seconds")
    parser.add_argument("--out", metavar="DIR", help="folder of the results")
    parser.add_argument(
        "--cifar10",
        metavar="DIR",
        help="folder with the images of CIFAR-10: "
        "train.zip and test.zip, or folders train and test, with one folder for each class",
    )
    return parser


class _Lecture:
    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.short = bool(options.short)
        default = "outputs/lecture-short" if self.short else "outputs/lecture"
        self.results = Results(Path(options.out or default).absolute())
        self.cifar10 = Path(options.cifar10).absolute() if options.cifar10 else None
        self.failed: dict[str, str] = {}

    def list_exhibits(self) -> None:
        """Print the exhibits."""
        rows = [
            (e.name, e.title, f"{e.minutes:g}", "yes" if e.is_done(self.results) else "no")
            for e in EXHIBITS.values()
        ]
        columns = ("exhibit", "what it shows", "minutes", "done")
        caption = f"minutes on two cores, without runs that exhibits share; {self.results.folder}"
        show([Table("", columns, rows, caption, prose=("what it shows",))], {}, None)

    def run(self) -> None:
        """Run what is missing, and write the page after each exhibit."""
        wanted = self._wanted()
        missing = [exhibit for exhibit in wanted if not exhibit.is_done(self.results)]
        self._check_cifar10()
        if self.options.overrides:  # a mistake would be found hours later, in one run after another
            for job in {job.name: job for exhibit in missing for job in exhibit.jobs}.values():
                compose_config(self._arguments(job))
        if self.cifar10 is None and (without := [e for e in missing if e.needs_cifar10]):
            names = ", ".join(exhibit.name for exhibit in without)
            if self.options.only is not None:
                raise ConfigError(f"--only={names}: {_NEEDED}")
            print(f"left out: {names}; {_NEEDED}")
            missing = [exhibit for exhibit in missing if exhibit not in without]
        self._claim(missing)
        minutes = sum(exhibit.minutes for exhibit in missing)
        expected = "seconds each" if self.short else f"about {minutes:.0f} minutes on two cores"
        print(f"{len(missing)} of {len(wanted)} exhibits to run, {expected}", flush=True)
        for number, exhibit in enumerate(missing, 1):
            print(f"\n[{number}/{len(missing)}] {exhibit.name}: {exhibit.title}", flush=True)
            try:
                self._complete(exhibit)
            except (RunError, ConfigError) as error:
                self.failed[exhibit.name] = f"Failed: {first_line(error)}"
            self._write_page()
        path = self._write_page()
        print(f"\n{path}")
        if self.failed:
            raise RunError(f"{', '.join(self.failed)}: the reason is above")

    def _check_cifar10(self) -> None:
        folder = self.cifar10
        if folder is None:
            return
        for part in ("train", "test"):
            if not any((folder / name).exists() for name in (f"{part}.zip", part)):
                raise ConfigError(
                    f"--cifar10={folder}: there is no {part}.zip, nor a folder {part}"
                )

    def _wanted(self) -> Sequence[Exhibit]:
        if self.options.only is None:
            return list(EXHIBITS.values())
        names = self.options.only.split(",")
        for name in names:
            if name not in EXHIBITS:
                raise ConfigError(f"--only={name}: it must be one of {', '.join(EXHIBITS)}")
        return [exhibit for name, exhibit in EXHIBITS.items() if name in names]

    def _claim(self, exhibits: Iterable[Exhibit]) -> None:
        """Note the settings of all runs. Raises ConfigError if a run had other ones before."""
        path = self.results.folder / "runs.json"
        try:
            known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        except ValueError as error:
            raise ConfigError(
                f"{path} is damaged: delete it, and give the settings of before again"
            ) from error
        now = {job.name: self._arguments(job) for exhibit in exhibits for job in exhibit.jobs}
        version = {"short": self.short}
        if known.get("version", version) != version:
            other = "full" if self.short else "short"
            raise ConfigError(
                f"{self.results.folder} has the results of the {other} version; choose another "
                "folder with --out, or delete that one"
            )
        for name, arguments in now.items():
            if known.get(name, arguments) != arguments:
                raise ConfigError(
                    f"{self.results.folder}: {name} has other settings there, "
                    f"{shlex.join(known[name])}; choose another folder with --out, or delete that "
                    "one"
                )
        content = json.dumps({**known, "version": version, **now}, indent=1).encode()
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(content))

    def _arguments(self, job: Job) -> list[str]:
        return [*job.arguments(self.short, self.cifar10), *self.options.overrides]

    def _complete(self, exhibit: Exhibit) -> None:
        for job in exhibit.jobs:
            if not self.results.is_done(job):
                self._run(job)
        if exhibit.measure is not None and self.results.measured(exhibit.name) is None:
            signals = Signals()
            with signals.installed():
                try:
                    measured = exhibit.measure(self.results, self.short)
                except Exception as error:  # of other processes, too; the exhibits after it follow
                    raise RunError(f"the measurement failed: {first_line(error)}") from error
                self.results.keep(exhibit.name, measured)

    def _run(self, job: Job) -> None:
        """Start or continue a run or a sweep. Raises RunError, Interrupted."""
        folder = self.results.job(job)
        arguments = self._arguments(job)
        print(f"python -m trainer {shlex.join(arguments)}", flush=True)
        if (folder / "config.yaml").exists():
            arguments = [f"resume={folder}"]
        else:
            arguments = [*arguments, f"hydra.run.dir={folder}"]
        code = run_command(arguments)
        if code > 128:
            raise Interrupted("SIGINT" if code == 130 else "SIGTERM", code - 128)
        if code not in (DONE, LIMITS):
            raise RunError(f"the run {job.name} ended with exit code {code}")

    def _write_page(self) -> Path:
        text = page(
            EXHIBITS,
            self.results,
            short=self.short,
            cifar10=self.cifar10,
            command=self.command,
            failed=self.failed,
            date=time.strftime("%Y-%m-%d %H:%M"),
        )
        path = self.results.folder / "lecture.html"
        atomic_write(path, lambda file: file.write(text.encode()))
        return path


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
