"""The run directory: everything that a run leaves on disk, written by the driver alone."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from trainer.errors import ConfigError, RunError
from trainer.store.files import write_whole


class RunDirectory:
    """One run's folder. Files appear whole or not at all: each is written aside and renamed."""

    def __init__(self, path: Path, new_parents: Sequence[Path] = ()) -> None:
        self.path = path
        self._new_parents = new_parents  # that were made for it, the innermost first

    @classmethod
    def claim(cls, wanted: Path) -> "RunDirectory":
        """Create `wanted`, or where that exists `wanted-2`, `wanted-3` and so on.

        Raises:
            ConfigError: the folder cannot be made.
        """
        if len(wanted.parts) > 1 and wanted.parts[0].endswith(":"):  # pathlib has made s3:/ of it
            raise ConfigError(
                f"hydra.run.dir={wanted.parts[0]}//{'/'.join(wanted.parts[1:])}: a run is written "
                "to a folder of this machine, not to a URL; copy it, or mount the storage"
            )
        wanted = candidate = wanted.resolve()
        number = 1
        if wanted == Path.cwd() or not wanted.name:
            raise ConfigError(f"hydra.run.dir={wanted}: it must be a folder of the run's own")
        new_parents = [parent for parent in candidate.parents if not parent.exists()]
        while True:
            try:
                candidate.mkdir(parents=True)
                return cls(candidate, new_parents)
            except FileExistsError:
                number += 1
                candidate = candidate.with_name(f"{wanted.name}-{number}")
            except OSError as error:
                raise ConfigError(
                    f"hydra.run.dir={wanted}: the run's folder cannot be made: {error}"
                ) from error

    def discard(self) -> None:
        """Remove the folder and the parents that were made for it: nothing was started."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in self._new_parents:
            try:
                parent.rmdir()
            except OSError:  # another run has moved in
                return

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None]) -> Iterator[None]:
        """Keep a second driver out. Raises RunError where one is at work already.

        Args:
            say: is told where the file system knows no locks, as some of clusters do not.
        """
        with self._lockable() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"{self.path}: another process is at work on this run") from error
            except OSError as error:
                say(f"{self.path}: it cannot be locked ({error}): start no second command on it")
            yield

    def _lockable(self) -> BinaryIO:
        """config.yaml; open for writing too where that is allowed: NFS locks no other files."""
        path = self.path / "config.yaml"
        try:
            return path.open("r+b")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return path.open("rb")

    def read_config(self) -> dict[str, Any]:
        """What `write_config` wrote. Raises ConfigError where there is no run."""
        path = self.path / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(
                f"resume={self.path}: there is no run to go on with: {error}"
            ) from error
        if not isinstance(config, dict):
            raise ConfigError(f"resume={self.path}: {path} holds no configuration")
        return config

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json; None where the run has not ended yet."""
        try:
            summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):
            return None
        return summary

    def write_command(self, arguments: Sequence[str]) -> None:
        """command.json: the arguments that the folder was begun with."""
        self._replace("command.json", json.dumps(list(arguments)).encode())

    def has_command(self) -> bool:
        """Whether there is one."""
        return (self.path / "command.json").exists()

    def read_command(self) -> list[str]:
        """What `write_command` wrote."""
        arguments: list[str] = json.loads((self.path / "command.json").read_text())
        return arguments

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml: all that is needed to run the same again."""
        content = yaml.safe_dump(dict(config), sort_keys=False).encode()
        self._replace("config.yaml", content, durable=True)  # without it nothing can be resumed

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """summary.json."""
        self._replace("summary.json", (_json(summary, indent=2) + "\n").encode())

    def append_metrics(self, entry: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        self._append("metrics.jsonl", _json(entry))

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, without one that was cut short; empty where nothing is."""
        path = self.path / "metrics.jsonl"
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # the run was killed while it wrote
                entries.append(json.loads(line))
        return entries

    def cut_metrics(self, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Leave only the lines of metrics.jsonl that `keep` wants; a line cut short goes too."""
        kept = [_json(entry) for entry in self.read_metrics() if keep(entry)]
        if (self.path / "metrics.jsonl").exists():
            self._replace("metrics.jsonl", "".join(f"{line}\n" for line in kept).encode())

    def log(self, text: str) -> None:
        """Lines of log.txt."""
        self._append("log.txt", text)

    def write_model(self, weights: bytes) -> None:
        """model.safetensors: the weights that the run ended with."""
        self._replace("model.safetensors", weights)

    def write_artifact(self, content: bytes) -> None:
        """model.dcz: the compressed model."""
        self._replace("model.dcz", content)

    def read_artifact(self) -> bytes:
        """What `write_artifact` left on the disk."""
        return (self.path / "model.dcz").read_bytes()

    def write_onnx(self, content: bytes) -> None:
        """model.onnx: the last model."""
        self._replace("model.onnx", content)

    def has_report(self) -> bool:
        """Whether `write_report` has got to its end."""
        return (self.path / "report.html").exists()

    def write_report(self, page: str) -> None:
        """report.html: the finished run on one page."""
        self._replace("report.html", page.encode())

    def _append(self, name: str, line: str) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _replace(self, name: str, content: bytes, *, durable: bool = False) -> None:
        write_whole(self.path / name, lambda file: file.write(content), durable=durable)


def _json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON text; what is NaN or infinite, for which JSON has no word, is null."""
    return json.dumps(_finite(record), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list():
            return [_finite(item) for item in value]
    return value


def as_json(record: Any) -> dict[str, Any]:
    """A message as plain values."""
    return dataclasses.asdict(record)
