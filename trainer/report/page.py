"""report.html: a finished run on one page, complete in itself, with nothing to fetch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from trainer.report import plots
from trainer.report.distributions import Distribution
from trainer.report.tables import compared, hosts, layers, megabytes, number, onnx, phases, stages

_DRAWN = 24  # tensors whose weights are drawn, the largest ones


def page(
    summary: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    shared: Sequence[Distribution] = (),
) -> str:
    """The page as HTML.

    Args:
        summary: the content of summary.json of a run that ended; parts may be missing.
        metrics: the lines of metrics.jsonl.
        config: the content of config.yaml.
        shared: the weights before and after sharing.
    """
    artifact = summary.get("artifact")
    drawn = sorted(shared, key=lambda tensor: -tensor.sizes.sum())[:_DRAWN]
    return _template().render(
        summary=summary,
        artifact=artifact,
        highlights=_highlights(summary),
        phases=phases(summary),
        stages=artifact and stages(artifact),
        compared=artifact and compared(artifact),
        layers=artifact and layers(artifact),
        onnx=onnx(summary["onnx"]) if summary.get("onnx") else None,
        facts=_facts(summary),
        losses=summary["phases"] and Markup(plots.losses(summary["phases"], metrics)),
        accuracies=summary["phases"] and Markup(plots.accuracies(summary["phases"], metrics)),
        compression=artifact and Markup(plots.compression(artifact["stages"])),
        weights=[
            (tensor.name, Markup(plots.distribution(index, tensor)))
            for index, tensor in enumerate(shared)
            if tensor in drawn
        ],
        not_drawn=len(shared) - len(drawn),
        config=yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
    )


def _highlights(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The result in a few figures, each with what it is."""
    artifact = summary.get("artifact")
    accuracy = artifact["accuracy"] if artifact else summary["accuracy"]
    found = [(number(accuracy, ".2%"), "test accuracy" + " of the file" * bool(artifact))]
    baseline = summary.get("baseline_accuracy")
    if baseline is not None and baseline != accuracy:
        found.append((number(baseline, ".2%"), "test accuracy of the dense model"))
    if artifact:
        found.append((f"{artifact['ratio']:.1f}x", "smaller than the dense weights"))
        dense = megabytes(artifact["dense_bytes"])
        found.append((megabytes(artifact["bytes"]), f"instead of {dense}"))
    elif summary["phases"]:
        last = summary["phases"][-1]
        found.append((f"{last['nonzero'] / last['parameters']:.1%}", "of the parameters kept"))
    return [*found, (f"{summary['seconds']:,.0f} s", "from start to end")]


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ran where, and how long."""
    speed = summary["images_per_second"]
    versions = summary.get("versions", {})
    found = [
        ("nodes", hosts(summary)),
        ("device", summary.get("device")),
        ("workers", summary["workers"]),
        ("restarts", summary["restarts"]),
        ("seconds", f"{summary['seconds']:,.1f}"),
        ("training samples per second", f"{speed:,.0f}" if speed else None),
        ("precision", summary["precision"]),
        ("seed", summary["seed"]),
        *versions.items(),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
