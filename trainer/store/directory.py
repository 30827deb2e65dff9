"""The run directory: all files of a run except checkpoints. Only the driver writes them."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import yaml

from trainer.errors import ConfigError, RunError, one_line
from trainer.store.files import atomic_write

T = TypeVar("T")

METRICS, MEMBERS = "metrics.jsonl", "members.jsonl"  # a line per epoch, per group of workers


class RunDirectory:
    """The folder of one run. Its files are written atomically."""

    def __init__(self, path: Path, new_parents: Sequence[Path] = ()) -> None:
        self.path = path
        self._new_parents = new_parents  # created for this folder, the innermost first

    @classmethod
    def claim(cls, wanted: Path) -> "RunDirectory":
        """Create `wanted`, or if it exists `wanted-2`, `wanted-3` and so on.

        Raises:
            ConfigError: The folder cannot be created.
        """
        if len(wanted.parts) > 1 and wanted.parts[0].endswith(":"):  # pathlib has made s3:/ of it
            raise ConfigError(
                f"hydra.run.dir={wanted.parts[0]}//{'/'.join(wanted.parts[1:])}: a run is written "
                "to a folder of this machine, not to a URL; copy it, or mount the storage"
            )
        wanted = candidate = wanted.resolve()
        number = 1
        if wanted == Path.cwd() or not wanted.name:
            raise ConfigError(f"hydra.run.dir={wanted}: it must be a folder for this run alone")
        new_parents = [path for path in candidate.parents if not os.path.exists(path)]
        while True:
            try:
                candidate.mkdir(parents=True)
                return cls(candidate, new_parents)
            except FileExistsError:
                number += 1
                candidate = candidate.with_name(f"{wanted.name}-{number}")
            except OSError as error:
                for parent in new_parents:
                    with contextlib.suppress(OSError):  # the folder was not created
                        parent.rmdir()
                raise ConfigError(
                    f"the run directory {wanted} cannot be created: {error.strerror}; choose "
                    "another with hydra.run.dir=FOLDER, or out in Python"
                ) from error

    def discard(self) -> None:
        """Delete the folder and the parents that were created for it: nothing was started."""
        shutil.rmtree(self.path, ignore_errors=True)
        for parent in self._new_parents:
            try:
                parent.rmdir()
            except OSError:  # another run uses it
                return

    @contextlib.contextmanager
    def locked(self, notify: Callable[[str], None]) -> Iterator[None]:
        """Lock the folder against a second driver. Raises RunError if it is locked already.

        Args:
            notify: Called with one line if the file system has no locks.
        """
        with self._lockable() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"{self.path}: another process is working on this run") from error
            except OSError as error:
                notify(f"{self.path}: it cannot be locked ({error}): start no second command on it")
            yield

    def _lockable(self) -> BinaryIO:
        """config.yaml, open for writing if that is allowed: NFS locks no other files."""
        path = self.path / "config.yaml"
        try:
            return path.open("r+b")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
            return path.open("rb")

    def has_config(self) -> bool:
        """Whether config.yaml is there, without which nothing can be resumed."""
        return (self.path / "config.yaml").exists()

    def read_config(self) -> dict[str, Any]:
        """The content of config.yaml. Raises ConfigError if there is no run."""
        path = self.path / "config.yaml"
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"resume={self.path}: there is no run to resume: {error}") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            reason = one_line(str(error))
            raise ConfigError(f"resume={self.path}: config.yaml is damaged: {reason}") from error
        if not isinstance(config, dict):
            raise ConfigError(f"resume={self.path}: {path} is not a configuration")
        return config

    def read_summary(self) -> dict[str, Any] | None:
        """The content of summary.json; None if the run has not ended yet."""
        try:
            summary: dict[str, Any] = json.loads((self.path / "summary.json").read_text())
        except (OSError, ValueError):
            return None
        return summary

    def write_command(self, arguments: Sequence[str] | None) -> None:
        """Write command.json: the arguments of the command that created the folder, if one did."""
        content = None if arguments is None else list(arguments)
        self._replace("command.json", json.dumps(content).encode())

    def has_command(self) -> bool:
        """Whether there is a command.json."""
        return (self.path / "command.json").exists()

    def read_command(self) -> list[str] | None:
        """The content of command.json."""
        arguments: list[str] | None = json.loads((self.path / "command.json").read_text())
        return arguments

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml: all settings of the run."""
        content = yaml.safe_dump(dict(config), sort_keys=False).encode()
        self._replace("config.yaml", content, durable=True)  # nothing can be resumed without it

    def write_objects(self, content: bytes) -> None:
        """Write objects.pkl, readable by the user only: objects that config.yaml refers to."""
        path = self.path / "objects.pkl"
        self._replace("objects.pkl", content, durable=True)
        path.chmod(0o600)

    def read_objects(self) -> bytes | None:
        """The content of objects.pkl; None if there is none."""
        path = self.path / "objects.pkl"
        return path.read_bytes() if path.exists() else None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json."""
        self._replace("summary.json", (_json(summary, indent=2) + "\n").encode())

    def delete_summary(self) -> None:
        """Delete summary.json, since the run continues."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Append an entry to a .jsonl file: `METRICS` or `MEMBERS`."""
        self._append(name, _json(entry))

    def entries(self, name: str) -> list[dict[str, Any]]:
        """The entries of a .jsonl file; an incomplete line is skipped. Empty without a file."""
        path = self.path / name
        entries = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with contextlib.suppress(ValueError):  # a killed driver left an incomplete line
                entries.append(json.loads(line))
        return entries

    def truncate(self, name: str, keep: Callable[[Mapping[str, Any]], bool]) -> None:
        """Keep only the entries of a .jsonl file for which `keep` returns True."""
        kept = [_json(entry) for entry in self.entries(name) if keep(entry)]
        if (self.path / name).exists():
            self._replace(name, "".join(f"{line}\n" for line in kept).encode())

    def log(self, text: str) -> None:
        """Append lines to log.txt."""
        self._append("log.txt", text)

    def write_model(self, weights: bytes) -> None:
        """Write model.safetensors: the final weights."""
        self._replace("model.safetensors", weights)

    def write_artifact(self, content: bytes) -> None:
        """Write model.dcz: the compressed model."""
        self._replace("model.dcz", content)

    def read_artifact(self) -> bytes:
        """The content of model.dcz on disk."""
        return (self.path / "model.dcz").read_bytes()

    def write_trace(self, name: str, content: bytes) -> None:
        """Write a file into profile/."""
        (self.path / "profile").mkdir(exist_ok=True)
        self._replace(f"profile/{name}", content)

    def write_onnx(self, content: bytes) -> None:
        """Write model.onnx: the final model."""
        self._replace("model.onnx", content)

    def has_report(self) -> bool:
        """Whether there is a report.html."""
        return (self.path / "report.html").exists()

    def write_report(self, page: str) -> None:
        """Write report.html: the finished run on one page."""
        self._replace("report.html", page.encode())

    def _append(self, name: str, line: str) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _replace(self, name: str, content: bytes, *, durable: bool = False) -> None:
        atomic_write(self.path / name, lambda file: file.write(content), durable=durable)


def _json(record: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON text, with null for NaN and infinity, which JSON does not have."""
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
    """A dataclass as plain values, in which metrics are entries of the record itself."""
    return cast(dict[str, Any], _with_metrics(dataclasses.asdict(record)))


def from_json(kind: type[T], record: Mapping[str, Any]) -> T:
    """The inverse of `as_json`, for a dataclass with `metrics`."""
    names = {field.name for field in dataclasses.fields(cast(Any, kind))}
    metrics = {key: value for key, value in record.items() if key not in names}
    own = {key: value for key, value in record.items() if key in names}
    return kind(**{"metrics": metrics, **own})


def _with_metrics(value: Any) -> Any:
    """Replace `metrics` by its entries, and `torch_metrics` by entries named torch_NAME."""
    if isinstance(value, list):
        return [_with_metrics(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    found: dict[str, Any] = {}
    for key, item in value.items():
        if key in ("metrics", "torch_metrics"):
            found |= {f"{key.removesuffix('metrics')}{name}": of for name, of in item.items()}
        else:
            found[key] = _with_metrics(item)
    return found
