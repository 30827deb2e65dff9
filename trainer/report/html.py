"""HTML templates that all reports share, and the functions that render them."""

import re
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup

from trainer.report.theme import CHART, PAGE


@cache
def environment() -> jinja2.Environment:
    """The environment of all templates: those of runs, and those of sweeps."""
    loaders = [jinja2.PackageLoader("trainer.report"), jinja2.PackageLoader("trainer.sweeps", ".")]
    made = jinja2.Environment(
        loader=jinja2.ChoiceLoader(loaders),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["theme"] = {**PAGE, **CHART}
    made.filters["breakable"] = _breakable
    return made


def _breakable(name: str) -> str:
    """Let a dotted name such as `model.kernel_size.0` break after its dots and underscores."""
    return re.sub(r"([._])(?=\w)", "\\1\u200b", name)


def render(template: str, **values: Any) -> str:
    """Render a template, such as `run.html.j2`."""
    return environment().get_template(template).render(**values)


def figures(svgs: dict[str, str]) -> list[tuple[Markup, str]]:
    """SVG text and caption of each figure for a template, which must not escape the SVG.

    Args:
        svgs: SVG text by caption.
    """
    return [(Markup(svg), caption) for caption, svg in svgs.items()]
