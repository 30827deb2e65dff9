"""Run the smoke experiment and draw docs/smoke.svg: what the terminal shows, and the chart.

    python docs/picture.py

The picture is as wide as a phone needs it: few columns, large type. It is an excerpt of the real
output: without the lines on single epochs, and without the table of layers.
"""

import io
import re
import tempfile
from pathlib import Path
from typing import Any

import rich.console
from rich.terminal_theme import TerminalTheme

import trainer
from trainer.driver import drive
from trainer.messages import EpochEnded, Message, Notice, Status
from trainer.report.plots import compression
from trainer.report.table import Table
from trainer.report.terminal import Console
from trainer.report.theme import CHART
from trainer.signals import Signals

PICTURE = Path(__file__).with_name("smoke.svg")
COMMAND = "python -m trainer +experiment=smoke"
COLUMNS = 54
MARGIN = 24  # of the picture, in its own units; a letter is 20 high
GROUND = CHART["card"][1]

THEME = TerminalTheme(
    (0x1B, 0x21, 0x2A),
    (0xE7, 0xEB, 0xF0),
    [(0x2A, 0x32, 0x3D), (0xFF, 0x8F, 0x56), (0x3E, 0xCB, 0x9D), (0xF0, 0xB7, 0x3C),
     (0x5A, 0xB4, 0xF0), (0xE6, 0xA3, 0xCB), (0x6F, 0xD3, 0xE3), (0xE7, 0xEB, 0xF0)],
)  # fmt: skip
# rich's own format loads a font from the internet, which pictures in a README may not.
FORMAT = """<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}"
     xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px;
}}
{styles}
</style>
<defs>{lines}</defs>
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</svg>"""


class Recorder(Console):
    """Keeps the coloured output of a run for a picture."""

    def __init__(self) -> None:
        terminal = rich.console.Console(
            record=True,
            width=COLUMNS,
            file=io.StringIO(),
            color_system="truecolor",
            highlight=False,
        )
        super().__init__(terminal)
        self.terminal.print(f"$ {COMMAND}", style="bold", markup=False)

    def on(self, message: Message) -> None:
        """Show what the picture has room for."""
        if not isinstance(message, EpochEnded | Notice | Status):
            super().on(message)

    def say(self, line: str, style: str | None = None) -> None:
        """Print one line, broken between words."""
        if not line.startswith("results in "):  # a folder that is gone afterwards
            self.terminal.print(line, markup=False, style=style)

    def status(self, text: str | None) -> None:
        """Nothing of what is not there in the end."""

    def show(self, table: Table) -> None:
        """Print a table; that of the layers is too long."""
        if not table.title.endswith("layers"):
            super().show(table)

    def svg(self) -> str:
        """All output so far as an <svg> element."""
        return self.terminal.export_svg(theme=THEME, code_format=FORMAT, unique_id="terminal")


def picture(terminal: str, chart: str) -> str:
    """Put a chart below the output of a terminal.

    Args:
        terminal, chart: <svg> elements; the chart is enlarged to the width of the terminal.
    """
    width, height = _size(terminal)
    chart_width, chart_height = _size(chart)
    chart_height *= width / chart_width
    for name, (light, dark) in CHART.items():
        chart = chart.replace(f"var(--{name},{light})", dark)
    chart = re.sub(
        r'width="[^"]*" height="[^"]*"', f'width="{width}" height="{chart_height}"', chart, count=1
    )
    whole, below = width + 2 * MARGIN, height + 2 * MARGIN
    total = below + chart_height + MARGIN
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {whole:.0f} {total:.0f}">
<title>{COMMAND}</title>
<rect width="100%" height="100%" rx="12" fill="{GROUND}"/>
<g transform="translate({MARGIN} {MARGIN})">
{terminal}
</g>
<g transform="translate({MARGIN} {below:.1f})">
{chart}
</g>
</svg>
"""


def _size(svg: str) -> tuple[float, float]:
    found = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert found is not None
    return float(found[1]), float(found[2])


def run(folder: Path) -> tuple[str, dict[str, Any]]:
    """Run the experiment. Returns the output as an <svg> element, and the summary."""
    experiment = trainer.compose("smoke")
    recorder = Recorder()
    signals = Signals()
    with signals.installed():
        directory = drive(experiment.config, lambda: experiment, folder, signals, console=recorder)
    summary = directory.read_summary()
    assert summary is not None
    return recorder.svg(), summary


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as parent:
        terminal, summary = run(Path(parent) / "smoke")
    PICTURE.write_text(picture(terminal, compression(summary["artifact"]["stages"])))
    print(f"{PICTURE}: {PICTURE.stat().st_size:,} bytes")
