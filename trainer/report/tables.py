"""The tables of a finished run as text: the terminal and report.html show the same ones."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.markup import escape

NOTHING = "–"  # noqa: RUF001 - what was not measured, or is not a number
_FRAME = "names, shapes, checksums"  # what a file holds besides its tensors
# In the names of stages.
_LETTERS = {"P": "pruned", "S": "values shared", "Q": "quantized", "H": "Huffman-coded"}


@dataclass(frozen=True)
class Table:
    """One table. The first column holds names, the others hold numbers."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    caption: str = ""


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """All tables of a finished run, whose content is that of summary.json."""
    artifact = summary.get("artifact")
    found = [phases(summary), *([stages(artifact), layers(artifact)] if artifact else [])]
    return [*found, onnx(summary["onnx"])] if summary.get("onnx") else found


def phases(summary: Mapping[str, Any]) -> Table:
    """The phases of a summary, a row each, and the test result; loss and accuracy on validation."""
    rows = [
        (
            phase["name"],
            f"{phase['steps']:,}",
            number(phase["loss"], ".4f"),
            number(phase["accuracy"], ".2%"),
            f"{phase['nonzero']:,}",
            f"{phase['nonzero'] / phase['parameters']:.1%}",
            megabytes(phase["sent_bytes_per_step"]) if phase["sent_bytes_per_step"] else "",
            f"{phase['images_per_second']:,.0f}" if phase["images_per_second"] else "",
            f"{phase['seconds']:.1f}",
        )
        for phase in summary["phases"]
    ]
    caption = [where(summary)]
    if summary["accuracy"] is not None:
        caption.insert(
            0,
            f"test set: {summary['accuracy']:.2%} correct, error {1 - summary['accuracy']:.2%}, "
            f"loss {number(summary['loss'], '.4f')}",
        )
    return Table(
        f"{summary['name']}: {summary['status']}",
        (
            "phase",
            "steps",
            "loss",
            "accuracy",
            "not zero",
            "kept",
            "sent/step",
            "samples/s",
            "s",
        ),
        rows,
        "\n".join(caption),
    )


def stages(artifact: Mapping[str, Any]) -> Table:
    """Bytes and test errors of each stage, beside the published ones where there are any."""
    rows = []
    for stage in artifact["stages"]:
        loss = stage.get("loss")
        row = (
            stage["name"],
            f"{stage['bytes']:,}",
            f"{stage['ratio']:.1f}x",
            f"{1 - stage['accuracy']:.2%}",
            number(loss, ".4f"),
            number(None if loss is None else perplexity(loss), "#.5g"),
        )
        rows.append((*row, _published(stage)) if compared(artifact) else row)
    columns = ("stage", "bytes", "ratio", "error", "loss", "perplexity")
    return Table(
        f"{artifact['path']}: test set",
        (*columns, "published") if compared(artifact) else columns,
        rows,
        "\n".join(_legend(artifact)),
    )


def compared(artifact: Mapping[str, Any]) -> bool:
    """Whether there are published figures to set the stages beside."""
    return any(stage["published"] for stage in artifact["stages"])


def _published(stage: Mapping[str, Any]) -> str:
    """The published ratio, and the published error where there is one."""
    literature = stage["published"]
    if not literature:
        return ""
    error = literature["error"]
    return f"{literature['ratio']:g}x" + ("" if error is None else f", {error:.2%}")


def _legend(artifact: Mapping[str, Any]) -> list[str]:
    """What the letters in the names of stages mean, and what else the table needs to be told."""
    names = [stage["name"].partition(" ")[0] for stage in artifact["stages"]]
    found = {letter for name in names for letter in name.split("+")}
    used = [f"{letter}: {meaning}" for letter, meaning in _LETTERS.items() if letter in found]
    lines = ["; ".join([*used, "perplexity: e to the loss"])]
    if compared(artifact):
        lines.append("published: ratio and error of Han, Mao & Dally, Deep Compression, ICLR 2016")
    return lines


def layers(artifact: Mapping[str, Any]) -> Table:
    """What each tensor takes in the file, and in the last row all else."""
    rows: list[tuple[str, ...]] = [
        (
            layer["name"],
            f"{layer['weights']:,}",
            f"{layer['nonzero']:,}",
            f"{layer['nonzero'] / max(1, layer['weights']):.1%}",
            f"{layer['bits']:g}",
            f"{layer['bytes']:,}",
            f"{layer['bytes'] / artifact['bytes']:.1%}",
        )
        for layer in artifact["layers"]
    ]
    rest = artifact["bytes"] - sum(layer["bytes"] for layer in artifact["layers"])
    nothing = [""] * 4
    rows.append((_FRAME, *nothing, f"{rest:,}", f"{rest / artifact['bytes']:.1%}"))
    columns = ("tensor", "values", "not zero", "kept", "bits", "bytes", "of the file")
    return Table("", columns, rows)


def onnx(converted: Sequence[Mapping[str, Any]]) -> Table:
    """What onnxruntime makes of the models, on validation data and one thread."""
    batches = list(converted[0]["milliseconds"])
    rows = [
        (
            model["name"],
            f"{model['file_bytes']:,}",
            f"{model['accuracy']:.2%}",
            f"{model['torch_accuracy']:.2%}",
            number(model["difference"], ".2g"),
            *(f"{model['milliseconds'][batch]:.3g}" for batch in batches),
        )
        for model in converted
    ]
    columns = ("model.onnx", "bytes", "accuracy", "in PyTorch", "largest difference")
    return Table(
        "onnxruntime: validation data, one thread",
        (*columns, *(f"ms, batch {batch}" for batch in batches)),
        rows,
    )


def where(summary: Mapping[str, Any]) -> str:
    """What ran where, and how long, in one line."""
    workers = summary["workers"]
    parts = [
        f"{workers} worker{'s' * (workers != 1)} on {summary['device']}",
        hosts(summary),
        f"{summary['restarts']} restart{'s' * (summary['restarts'] != 1)}",
        f"{summary['seconds']:.1f} s",
    ]
    return ", ".join(part for part in parts if part)


def hosts(summary: Mapping[str, Any]) -> str:
    """The nodes of a run, and how many of its workers each held: `a x2, b`."""
    found = Counter(summary["nodes"])
    return ", ".join(f"{node} x{n}" if n > 1 else node for node, n in found.items())


def rich_table(table: Table) -> rich.table.Table:
    """A table for the terminal."""
    result = rich.table.Table(title=escape(table.title) or None, title_justify="left")
    result.caption = escape(table.caption) or None
    result.caption_justify = "left"
    for index, title in enumerate(table.columns):
        result.add_column(title, justify="right" if index else "left", no_wrap=index > 0)
    for row in table.rows:
        result.add_row(*map(escape, row))
    return result


def number(value: float | None, spec: str) -> str:
    """`value` formatted as `spec` says; summary.json has null for what is NaN or infinite."""
    return NOTHING if value is None else format(value, spec)


def perplexity(loss: float) -> float:
    """e to the loss (nats); infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def megabytes(count: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
