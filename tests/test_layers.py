"""Imports go downwards only: every module of the framework stands on a floor, in the table below.

A module may import what stands on a lower floor, and what belongs to its own package. Imports
inside functions count as well. A command, `__main__` of a package, stands on the floor of all
commands: it may import everything, and nothing may import it. A cycle that only type annotations
need is a cycle all the same, so TYPE_CHECKING is refused.
"""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "trainer"

FLOORS = {
    "errors": 0,
    "imports": 0,
    "version": 0,
    "messages": 1,
    "metrics": 1,
    "signals": 1,
    "models": 1,
    "data": 1,
    "config": 2,
    "compress": 2,
    "tasks": 2,
    "engine": 3,
    "artifact": 3,
    "export": 3,
    "cluster": 4,
    "phases": 4,
    "hardware": 4,
    "inference": 4,
    "store": 4,
    "experiment": 5,
    "report": 5,
    "worker": 6,
    "command": 7,
    "driver": 7,
    "sweeps": 7,
    "library": 8,
    "testing": 8,
    "lecture": 9,
    "__main__": 10,
    "__init__": 10,
}

# A library that only one part may know: the others must work without it.
ONLY_IN = {"ray": "cluster", "optuna": "sweeps"}


def imports(module: str, tree: ast.Module, is_package: bool) -> set[str]:
    """Absolute dotted names of all that a module imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in trainer/engine/ring.py starts at trainer.engine.
            parts = module.split(".") + ["__init__"] * is_package
            base = ".".join(parts[: -node.level]) if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            names |= {f"{source}.{alias.name}" for alias in node.names}
    return names


def part(name: str) -> str:
    """The part of the framework that a dotted name belongs to: trainer.engine.ring -> engine."""
    pieces = name.split(".")
    if "__main__" in pieces:
        return "__main__"
    return pieces[1] if len(pieces) > 1 else "__init__"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of a module (a dotted name), one sentence each."""
    own = part(module)
    if own not in FLOORS:
        return [f"{module}: {own} has no floor; give it one in tests/test_layers.py"]
    tree = ast.parse(source)
    found = []
    for name in sorted(imports(module, tree, is_package)):
        library, target = name.split(".")[0], part(name)
        if ONLY_IN.get(library, own) != own:
            found.append(f"{module} imports {name}: only trainer.{ONLY_IN[library]} may")
        if library == "trainer" and target != own:
            if target not in FLOORS:
                found.append(f"{module} imports {name}: {target} has no floor")
            elif FLOORS[target] >= FLOORS[own]:
                found.append(
                    f"{module} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[target]})"
                )
        if name.endswith(".TYPE_CHECKING"):
            found.append(f"{module} imports TYPE_CHECKING")
    if any(
        isinstance(node, ast.Attribute) and node.attr == "TYPE_CHECKING" for node in ast.walk(tree)
    ):
        found.append(f"{module} uses TYPE_CHECKING")
    return found


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", modules(), ids=dotted)
def test_imports_go_downwards(path: Path) -> None:
    assert violations(dotted(path), path.read_text(), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trainer.engine.loop", "import trainer.worker.run"),
        ("trainer.engine.loop", "from trainer import worker"),
        ("trainer.engine.loop", "from trainer.phases.prune import Prune"),
        ("trainer.engine.loop", "from ..phases import prune"),
        ("trainer.engine.loop", "def f():\n    import trainer.cluster.ray_group"),
        ("trainer.engine.loop", "from trainer.report.table import table"),
        ("trainer.models.lstm", "import trainer.data"),
        ("trainer.engine.loop", "import trainer.unheard_of"),
        ("trainer.artifact.read", "from trainer.artifact.__main__ import main"),
        ("trainer.artifact.__main__", "import trainer"),
        ("trainer.unheard_of", "import os"),
        ("trainer.worker.run", "import ray"),
        ("trainer.driver", "from ray.util import placement_group"),
        ("trainer.cluster.group", "import optuna"),
        ("trainer.config", "from typing import TYPE_CHECKING"),
        ("trainer.config", "import typing\nif typing.TYPE_CHECKING:\n    pass"),
    ],
)
def test_checker_refuses(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source", "is_package"),
    [
        ("trainer.engine.loop", "from trainer.engine.ring import ring", False),
        ("trainer.engine.loop", "from .ring import ring\nfrom . import world", False),
        ("trainer.engine", "from .ring import ring", True),
        (
            "trainer.engine.loop",
            "from ..config import FitConfig\nfrom trainer import config",
            False,
        ),
        ("trainer.config", "from trainer import errors\nimport torch", False),
        ("trainer.cluster.group", "import ray\nfrom ray.util import placement_group", False),
        ("trainer.__main__", "from trainer.driver import drive", False),
        ("trainer.hardware.__main__", "from trainer.library.objects import load_objects", False),
        ("trainer.hardware.__main__", "from trainer.hardware.costs import network_costs", False),
    ],
)
def test_checker_accepts(module: str, source: str, is_package: bool) -> None:
    assert violations(module, source, is_package) == []


WALL_CLOCK = re.compile(r"\btime\.time(_ns)?\(|\bdatetime\.(now|today|utcnow)\(")
SHOWN = {"report/sinks/mlflow.py", "sweeps/study.py"}  # times of day that others store


def test_no_duration_is_measured_with_a_clock_that_can_jump() -> None:
    """A host whose clock is corrected must not take a worker for silent, or a limit for over."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if WALL_CLOCK.search(path.read_text())
    }
    assert found == SHOWN
