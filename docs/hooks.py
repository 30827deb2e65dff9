"""What MkDocs adds to the pages: the settings and experiments, from the comments in conf/."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
_SETTING = re.compile(r"(?P<indent> *)(?P<key>[\w.*]+):(?P<value>[^#]*)(?:#(?P<comment>.*))?$")
_OUTSIDE = re.compile(r"\[(?P<text>[^\]]+)\]\(\.\./(?P<path>[^)]+)\)")
_GROUPS = {
    "cluster": ("Workers", "cluster/local.yaml", "cluster."),
    "data": ("Data: MNIST", "data/mnist.yaml", "data."),
    "data: Datasets": ("Data: Datasets of torch", "data/dataset.yaml", "data."),
    "data: images": ("Data: images", "data/images.yaml", "data."),
    "data: table": ("Data: tables", "data/table.yaml", "data."),
    "data: huggingface": ("Data: Hugging Face", "data/huggingface.yaml", "data."),
    "data: stream": ("Data: streams", "data/stream.yaml", "data."),
    "data: text": ("Data: text", "data/text.yaml", "data."),
    **{
        f"task: {path.stem}": (f"Task: {path.stem}", f"task/{path.name}", "task.")
        for path in sorted((CONF / "task").glob("*.yaml"))
    },
    "optimizer": ("Optimizer", "optimizer/sgd.yaml", "optimizer."),
    "sweep": ("Sweeps", "sweep/default.yaml", "sweep."),
}


@dataclass
class Setting:
    """A setting of a configuration file."""

    key: str  # dotted
    default: str  # empty: a section
    meaning: str


def settings(path: Path) -> tuple[str, list[Setting]]:
    """The comment at the top of a configuration file, and its settings with theirs.

    A comment belongs to the setting on its line, and continues on lines that are comments only.
    """
    head: list[str] = []
    found: list[Setting] = []
    parents: list[tuple[int, str]] = []
    for line in path.read_text().splitlines():
        if line.startswith("# @") or not line.strip():
            continue
        if line.lstrip().startswith("#"):
            text = line.strip("# ")
            if found:
                found[-1].meaning = f"{found[-1].meaning} {text}".strip()
            else:
                head.append(text)
            continue
        match = _SETTING.match(line)
        if match is None:  # an entry of a list
            continue
        indent = len(match["indent"])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        key = ".".join([*(name for _, name in parents), match["key"]])
        parents.append((indent, match["key"]))
        found.append(Setting(key, match["value"].strip(), (match["comment"] or "").strip()))
    hidden = ("defaults", "hydra", "_target_")
    shown = [s for s in found if not s.key.startswith(hidden) and (s.default or s.meaning)]
    return " ".join(head), shown


def table(found: list[Setting], prefix: str = "") -> Iterator[str]:
    """A table in Markdown."""
    yield "| setting | default | meaning |"
    yield "| --- | --- | --- |"
    for setting in found:
        default = f"`{setting.default}`" if setting.default else ""
        yield f"| `{prefix}{setting.key}` | {_cell(default)} | {_cell(setting.meaning)} |"
    yield ""


def configuration() -> str:
    """The page on all settings."""
    lines = [
        "# Settings",
        "",
        "The settings of a run, with their defaults. [Command line and configuration](command.md) "
        "describes how to change them. In Python they are arguments of `trainer.Experiment` and of "
        "the phases.",
        "",
        "## General",
        "",
        *table([*settings(CONF / "config.yaml")[1], _precision()]),
    ]
    for title, file, prefix in _GROUPS.values():
        head, found = settings(CONF / file)
        lines += [f"## {title}", "", _escape(head), "", *table(found, prefix)]
    lines += ["## Phases", "", "`NAME` is the name that an experiment gives a phase.", ""]
    for path in sorted((CONF / "phase").glob("*.yaml")):
        head, found = settings(path)
        own = [setting for setting in found if not setting.key.startswith("fit")]
        lines += [f"### {path.stem}", "", _escape(head), "", *table(own, "phases.NAME.")]
        if path.stem == "train":
            fit = [setting for setting in found if setting.key.startswith("fit.")]
    lines += ["### Training of a phase", "", "Every phase has these.", ""]
    lines += table(fit, "phases.NAME.")
    lines += [
        "## Groups",
        "",
        "`GROUP=NAME` selects a file of `conf/GROUP/`, such as `model=convnet`.",
        "",
    ]
    for group in ("model", "data", "task", "optimizer", "precision", "cluster", "logger"):
        names = [path.stem for path in sorted((CONF / group).glob("*.yaml"))]
        lines.append(f"- `{group}`: {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines)


def _precision() -> Setting:
    """The setting `precision`, whose values are files."""
    files = sorted((CONF / "precision").glob("*.yaml"))
    values = "; ".join(f"{path.stem}: {settings(path)[0]}" for path in files)
    return Setting("precision", "fp32", values)


def experiments() -> str:
    """The page on the experiments that the package contains."""
    lines = [
        "# Experiments",
        "",
        "Each is a file in `conf/experiment/`. To start one: `python -m trainer +experiment=NAME`.",
        "",
        "| name | what it does |",
        "| --- | --- |",
    ]
    for path in sorted((CONF / "experiment").glob("*.yaml")):
        lines.append(f"| `{path.stem}` | {_cell(settings(path)[0])} |")
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    from mkdocs.structure.files import File

    for name, text in (("configuration.md", configuration()), ("experiments.md", experiments())):
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace links to files of the repository, which the site does not contain, by their paths."""
    return _OUTSIDE.sub(
        lambda link: (
            f"`{link['path']}`"
            if link["text"] == link["path"]
            else f"{link['text']} (`{link['path']}`)"
        ),
        markdown,
    )


def _cell(text: str) -> str:
    return _escape(text).replace("|", r"\|")


def _escape(text: str) -> str:
    """Text for Markdown: `*` and `<` of patterns are no markup, except in code."""
    parts = text.split("`")
    parts[::2] = [re.sub(r"([*<_\[])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)
