"""The tables of a finished run: the terminal, report.html and notebooks show the same ones."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.metrics import format_metric, metric_names
from trainer.report.cost import cost_line
from trainer.report.table import Table
from trainer.report.text import megabytes, number, perplexity, plural

_FRAME = "names, shapes, checksums"  # the other content of a model file
# Letters in the names of stages.
_LETTERS = {"P": "pruned", "S": "values shared", "Q": "quantized", "H": "Huffman-coded"}
_QUANTIZER = re.compile(r"(?:(?P<module>.*)\.)?\w*_quantizer\.\w+")


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """All tables of a finished run.

    Args:
        summary: the content of summary.json.
    """
    artifact = summary.get("artifact")
    found = [phases(summary)]
    if summary.get("members"):
        found.append(members(summary["members"]))
    if artifact:
        found += [
            stages(artifact, has_perplexity(summary), metric_names(summary)),
            layers(artifact),
        ]
    if table := step_times(summary):
        found.append(table)
    if summary.get("onnx"):
        found.append(onnx(summary["onnx"], metric_names(summary)))
    return found


def phases(summary: Mapping[str, Any]) -> Table:
    """One row for each phase; loss and metrics are of validation data."""
    metrics = metric_names(summary)
    rows = [
        (
            phase["name"],
            f"{phase['steps']:,}",
            number(phase["loss"], ".4f"),
            *(format_metric(name, phase[name]) for name in metrics),
            f"{phase['nonzero']:,}",
            f"{phase['nonzero'] / phase['parameters']:.1%}",
            megabytes(phase["sent_bytes_per_step"]) if phase["sent_bytes_per_step"] else "",
            f"{phase['images_per_second']:,.0f}" if phase["images_per_second"] else "",
            f"{1000 * phase['cost']['kwh']:.3g}" if phase.get("cost") else "",
            f"{phase['seconds']:.1f}",
        )
        for phase in summary["phases"]
    ]
    caption = [where(summary)]
    if summary.get("cost"):
        caption.append(f"training cost: {cost_line(summary['cost'])}")
    if summary["loss"] is not None:
        values = [f"{name} {format_metric(name, summary[name])}" for name in metrics]
        if "accuracy" in metrics:
            values.insert(1 + metrics.index("accuracy"), f"error {1 - summary['accuracy']:.2%}")
        caption.insert(0, f"test set: {', '.join(values)}, loss {number(summary['loss'], '.4f')}")
    return Table(
        f"{summary['name']}: {summary['status']}",
        (
            "phase",
            "steps",
            "loss",
            *metrics,
            "nonzero",
            "kept",
            "sent/step",
            "samples/s",
            "Wh",
            "seconds",
        ),
        rows,
        "\n".join(caption),
        optional=("nonzero", "sent/step", "Wh", "samples/s", "steps"),
    )


def step_times(summary: Mapping[str, Any]) -> Table | None:
    """The time of a step by section, for each phase and rank; None if nothing was measured."""
    measured = [p for p in summary["phases"] if (p.get("profile") or {}).get("steps")]
    if not measured:
        return None
    names = list(measured[0]["profile"]["ranks"][0])
    rows = [
        (f"{phase['name']}, rank {rank}", *(f"{times[name]:.2f}" for name in names))
        for phase in measured
        for rank, times in enumerate(phase["profile"]["ranks"])
    ]
    slowest = []
    for phase in measured:
        # All ranks take equally long for a step: the slowest one waits least for the others.
        waits = [times["exposed_communication"] for times in phase["profile"]["ranks"]]
        if len(waits) > 1:
            slowest.append(f"{phase['name']} waits for rank {waits.index(min(waits))}")
    return Table(
        "Time of a step, ms",
        ("phase", *(name.replace("_", " ") for name in names)),
        rows,
        "; ".join(slowest),
        optional=("rest", "hidden communication"),
    )


def has_perplexity(summary: Mapping[str, Any]) -> bool:
    """Whether the run trained a language model: its targets are sequences of tokens."""
    return bool(summary.get("sequence_targets"))


def stages(
    artifact: Mapping[str, Any], perplexities: bool = False, metrics: Sequence[str] = ("accuracy",)
) -> Table:
    """Size and test metrics of each stage, with published figures if there are any.

    Args:
        artifact: of summary.json.
        perplexities: add the perplexity, which is defined for language models only.
        metrics: Names of the metrics. Of an accuracy, the error is shown.
    """
    published = has_published(artifact)
    names = ["error" if name == "accuracy" else name for name in metrics]
    columns = ["stage", "bytes", "ratio", *names, "loss"]
    columns += ["perplexity"] * perplexities + ["published"] * published
    rows = []
    for stage in artifact["stages"]:
        loss = stage.get("loss")
        row = [
            stage["name"],
            f"{stage['bytes']:,}",
            f"{stage['ratio']:.1f}x",
            *(
                f"{1 - stage[name]:.2%}" if name == "accuracy" else format_metric(name, stage[name])
                for name in metrics
            ),
            number(loss, ".4f"),
        ]
        if perplexities:
            row.append(number(None if loss is None else perplexity(loss), "#.5g"))
        if published:
            row.append(_published(stage))
        rows.append(tuple(row))
    return Table(
        f"{artifact['path']}: test set",
        tuple(columns),
        rows,
        "\n".join(_legend(artifact, perplexities)),
        optional=("loss", "published"),
    )


def has_published(artifact: Mapping[str, Any]) -> bool:
    """Whether there are published figures to compare the stages with."""
    return any(stage["published"] for stage in artifact["stages"])


def _published(stage: Mapping[str, Any]) -> str:
    """The published ratio, and the published error if there is one."""
    published = stage["published"]
    if not published:
        return ""
    error = published["error"]
    return f"{published['ratio']:g}x" + ("" if error is None else f", {error:.2%}")


def _legend(artifact: Mapping[str, Any], perplexities: bool) -> list[str]:
    """Explain the letters in the names of stages, and the columns that need it."""
    names = [stage["name"].partition(" ")[0] for stage in artifact["stages"]]
    found = {letter for name in names for letter in name.split("+")}
    used = [f"{letter}: {meaning}" for letter, meaning in _LETTERS.items() if letter in found]
    lines = ["; ".join([*used, *["perplexity: e to the loss"] * perplexities])]
    if has_published(artifact):
        lines.append("published: ratio and error of Han, Mao & Dally, Deep Compression, ICLR 2016")
    return [line for line in lines if line]


def layers(artifact: Mapping[str, Any]) -> Table:
    """The bytes of each tensor in the file; the last row is everything else.

    The ranges and scales of quantizers count as bytes of the weight that they belong to.
    """
    total = artifact["bytes"]
    rows: list[tuple[str, ...]] = [
        (
            layer["name"],
            f"{layer['weights']:,}",
            f"{layer['nonzero']:,}",
            f"{layer['nonzero'] / max(1, layer['weights']):.1%}",
            f"{layer['bits']:g}",
            f"{layer['bytes']:,}",
            f"{layer['bytes'] / total:.1%}",
        )
        for layer in fold_quantizers(artifact["layers"])
    ]
    rest = total - sum(layer["bytes"] for layer in artifact["layers"])
    rows.append((_FRAME, "", "", "", "", f"{rest:,}", f"{rest / total:.1%}"))
    return Table(
        f"{artifact['path']}: layers",
        ("tensor", "values", "nonzero", "kept", "bits", "bytes", "of the file"),
        rows,
        "bits: of each value kept, before entropy coding",
        optional=("nonzero", "of the file", "kept"),
    )


def fold_quantizers(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add the bytes of `MODULE.*_quantizer.*` to MODULE.weight, and drop their entries.

    Without such a weight, the quantizers of a module share one entry.
    """
    kept = {
        layer["name"]: dict(layer) for layer in layers if not _QUANTIZER.fullmatch(layer["name"])
    }
    for layer in layers:
        found = _QUANTIZER.fullmatch(layer["name"])
        if found is None:
            continue
        prefix = f"{found['module']}." if found["module"] else ""
        owner = kept.get(f"{prefix}weight")
        if owner:
            owner["bytes"] += layer["bytes"]
            continue
        name = f"{prefix}quantizers"
        if name not in kept:
            kept[name] = {**layer, "name": name}
        else:
            for key in ("weights", "nonzero", "bytes"):
                kept[name][key] += layer[key]
    return list(kept.values())


def onnx(converted: Sequence[Mapping[str, Any]], metrics: Sequence[str] = ("accuracy",)) -> Table:
    """Metrics and speed of the exported models in onnxruntime: validation data, one thread."""
    batches = list(converted[0]["milliseconds"])
    rows = [
        (
            model["name"],
            f"{model['file_bytes']:,}",
            *(format_metric(name, model[name]) for name in metrics[:1]),
            *(format_metric(name, model[f"torch_{name}"]) for name in metrics[:1]),
            number(model["difference"], ".2g"),
            *(f"{model['milliseconds'][batch]:.3g}" for batch in batches),
        )
        for model in converted
    ]
    return Table(
        "model.onnx: validation data, onnxruntime with one thread",
        (
            "model",
            "bytes",
            *metrics[:1],
            *["PyTorch"] * bool(metrics),
            "difference",
            *(f"ms, batch {b}" for b in batches),
        ),
        rows,
        f"PyTorch: {next(iter(metrics), 'loss')} of the same model in PyTorch; difference: the "
        "largest one of an output",
        optional=("difference", "PyTorch"),
    )


def members(groups: Sequence[Mapping[str, Any]]) -> Table:
    """One row for each group of workers of an elastic run."""
    rows = [
        (
            f"{group['phase'] + 1}",
            f"{group['step']:,}",
            f"{group['workers']}",
            f"{group['seconds']:.1f}",
            group["time"].partition("T")[2][:8],
            group["reason"],
        )
        for group in groups
    ]
    return Table(
        "workers over the run",
        ("phase", "after step", "workers", "ready after s", "time", "reason"),
        rows,
        "ready after: seconds from noticing the loss or the change until the workers could train",
        optional=("time",),
    )


def where(summary: Mapping[str, Any]) -> str:
    """One line: workers, machines, precision and duration."""
    restarts = summary["restarts"]
    parts = [
        workers(summary),
        str(summary.get("device") or ""),
        f"{restarts} {plural('restart', restarts)}",
        f"{summary['seconds']:.1f} s",
    ]
    return ", ".join(part for part in parts if part)


def workers(summary: Mapping[str, Any]) -> str:
    """Text: the number of workers on each machine."""
    count = summary["workers"]
    text = f"{count} {plural('worker', count)}"
    nodes = Counter(summary["nodes"])
    if len(nodes) == 1:
        return f"{text} on {'one machine' if count != 1 else 'machine'} {next(iter(nodes))}"
    if nodes:
        each = ", ".join(f"{node} ({n})" for node, n in nodes.items())
        return f"{text} on {len(nodes)} machines: {each}"
    return text
