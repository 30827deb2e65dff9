"""report.html of a finished run: one page that needs no other file."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trainer.metrics import first_metric, format_metric, metric_names
from trainer.report import hardware, plots
from trainer.report.cost import cost_line
from trainer.report.distributions import Distribution
from trainer.report.html import figures, render
from trainer.report.tables import (
    has_perplexity,
    has_published,
    layers,
    onnx,
    phases,
    stages,
    step_times,
    workers,
)
from trainer.report.text import megabytes

_DRAWN = 24  # tensors whose weights are drawn: the largest ones


def page(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    shared: Sequence[Distribution] = (),
) -> str:
    """Render the page.

    Args:
        summary: the content of summary.json of a run that ended; parts may be missing.
        metrics: the lines of metrics.jsonl.
        config: the content of config.yaml.
        shared: the weights before and after sharing.

    Returns:
        HTML text.
    """
    artifact, costs = summary.get("artifact"), summary.get("hardware")
    drawn = sorted(shared, key=lambda tensor: -tensor.sizes.sum())[:_DRAWN]
    return render(
        "run.html.j2",
        title=summary["name"],
        status=summary["status"],
        status_text={"limits": "limits missed"}.get(summary["status"], summary["status"]),
        date=summary.get("date"),
        command=summary.get("command"),
        error=summary["error"],
        highlights=highlights(summary),
        curves=figures(learning_curves(summary, metrics)),
        artifact_path=artifact and artifact["path"],
        stages=artifact and stages(artifact, has_perplexity(summary), metric_names(summary)),
        compression=figures(compression_chart(artifact, first_metric(summary)[0]))
        if artifact
        else [],
        layers=artifact and layers(artifact),
        onnx=onnx(summary["onnx"], metric_names(summary)) if summary.get("onnx") else None,
        weights=figures(
            {
                tensor.name: plots.distribution(index, tensor)
                for index, tensor in enumerate(shared)
                if tensor in drawn
            }
        ),
        not_drawn=len(shared) - len(drawn),
        hardware=costs and hardware.table(costs),
        hardware_charts=figures(hardware.charts(costs)) if costs else [],
        phases=phases(summary),
        step_times=step_times(summary),
        facts=_facts(summary),
        config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    )


def learning_curves(
    summary: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """The learning curves of a run as SVG, by caption."""
    if not summary["phases"]:
        return {}
    return {
        **{
            f"{name.capitalize()} on validation data after each epoch. A diamond is a phase "
            "without training.": plots.metric_curve(summary["phases"], metrics, name)
            for name in metric_names(summary)[:1]
        },
        "Loss on training data (mean over each epoch) and on validation data (after it).":
            plots.losses(summary["phases"], metrics),
    }  # fmt: skip


def compression_chart(artifact: Mapping[str, Any], name: str = "accuracy") -> dict[str, str]:
    """The first metric, `name`, against compression ratio as SVG, by caption."""
    caption = f"Test {name} against compression."
    if has_published(artifact):
        caption += " Hollow: published."
    return {caption: plots.compression(artifact["stages"], name)}


def highlights(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The main figures of the result, each with its label."""
    artifact = summary.get("artifact")
    name, _ = first_metric(summary)
    value = (artifact or summary)[name]
    found = [(format_metric(name, value), f"test {name}" + " of the file" * bool(artifact))]
    baseline = summary.get(f"baseline_{name}")
    if baseline is not None and baseline != value:
        found.append((format_metric(name, baseline), f"test {name} of the dense model"))
    if artifact:
        found.append((f"{artifact['ratio']:.1f}x", "smaller than the dense weights"))
        dense = megabytes(artifact["dense_bytes"])
        found.append((megabytes(artifact["bytes"]), f"instead of {dense}"))
    elif summary["phases"]:
        last = summary["phases"][-1]
        found.append((f"{last['nonzero'] / last['parameters']:.1%}", "of the parameters kept"))
    return [*found, (f"{summary['seconds']:,.0f} s", "from start to end")]


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Text: workers, machine, precision and duration."""
    speed = summary["images_per_second"]
    versions = summary.get("versions", {})
    found = [
        ("workers", workers(summary)),
        ("device", summary.get("device")),
        ("restarts", summary["restarts"]),
        ("seconds", f"{summary['seconds']:,.1f}"),
        ("training samples/s", f"{speed:,.0f}" if speed else None),
        ("cost of training", summary.get("cost") and cost_line(summary["cost"])),
        ("precision", summary["precision"]),
        ("seed", summary["seed"]),
        *versions.items(),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]
