"""The terminal: output for messages, without training."""

import errno
import io
import os
import re
import sys
import types

import pytest
from rich.console import Console as Terminal

from trainer.messages import (
    EpochEnded,
    Notice,
    PhaseEnded,
    PhaseStarted,
    Progress,
    RoundEnded,
    RoundRecord,
    RunStarted,
    Status,
)
from trainer.report.lines import describe
from trainer.report.pace import Pace
from trainer.report.table import Table, rich_table
from trainer.report.terminal import Console
from trainer.report.text import duration, megabytes, significant
from trainer.testing.sinks import phase_record

RECORD = phase_record("prune")
STARTED = RunStarted(
    workers=2,
    device="cpu",
    parameters=1000,
    train=640,
    validation=64,
    test=64,
    phase_steps=(10, 20, 40),
)
PHASE = PhaseStarted(
    index=1, name="prune", kind="prune", epochs=2, steps=20, learnable=1000, sparsity=0.0
)
MESSAGES = [
    Status("starting Ray and 2 workers"),
    STARTED,
    PHASE,
    Progress("prune", epoch=1, epochs=2, step=5, steps=20, loss=0.5, lr=0.1, images_per_second=9.0),
    EpochEnded("prune", 1, 10, 0.3, 0.2, {"accuracy": 0.95}, 0.1, 0.0, 500.0, skipped=3),
    EpochEnded("prune", 2, 20, 0.25, 0.1, {"accuracy": 0.975}, 0.0, 0.92, 512.0, skipped=0),
    PhaseEnded(index=0, record=RECORD, weights=b""),
]


def console_of(width=80, is_terminal=True):
    out = io.StringIO()
    terminal = Terminal(file=out, force_terminal=is_terminal, width=width, color_system=None)
    return Console(terminal), out


def screen(console):
    """The live display as text."""
    terminal = Terminal(file=io.StringIO(), width=console.terminal.width, color_system=None)
    terminal.print(console._render())
    return terminal.file.getvalue()


def progress(step, epoch=1):
    return Progress("prune", epoch, 2, step, 20, loss=0.5, lr=0.1, images_per_second=900.0)


def test_plain_output_has_a_line_for_what_matters_and_none_for_progress():
    console, out = console_of(width=120, is_terminal=False)
    with console:
        for message in MESSAGES:
            console.on(message)
    lines = out.getvalue().splitlines()
    assert lines == [
        "starting Ray and 2 workers",
        "2 workers on cpu; 1,000 parameters; samples: 640 training, 64 validation, 64 test",
        "prune: 2 epochs, 20 steps, 1,000 trainable values",
        "prune epoch 1: loss 0.3000 (validation 0.2000), accuracy 95.00%, 500 samples/s, "
        "3 steps skipped",
        "prune epoch 2: loss 0.2500 (validation 0.1000), accuracy 97.50%, sparsity 92.0%, "
        "512 samples/s",
        "prune done in 2.5 s: accuracy 97.50%, 80 of 1,000 parameters are nonzero",
    ]


def test_a_terminal_shows_the_phase_and_the_time_left_of_it_and_of_all(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console, _ = console_of()
    for message in (STARTED, PHASE, progress(5)):
        console.on(message)
    assert "left" not in screen(console)  # one report tells no speed
    now[0] += 10.0
    console.on(progress(10))
    bar, numbers = screen(console).splitlines()
    assert bar.startswith("phase 2 of 3: prune ")
    assert bar.endswith(" 10/20 steps")
    assert numbers.startswith("epoch 1 of 2, loss 0.5000, 900 samples/s, 20 s left (1 min 40 s")
    assert len(bar) <= 80
    assert len(numbers) <= 80


def test_the_live_display_fits_eighty_columns_with_large_numbers(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console, _ = console_of()
    console.on(RunStarted(8, "cpu", 1, 1, 1, 1, phase_steps=(9, 2_000_000, 2_000_000)))
    console.on(PhaseStarted(1, "a_rather_long_name", "x", 100, 2_000_000, 1, 0.0))
    for step in (1, 1000):
        now[0] += 500.0
        console.on(Progress("x", 10, 100, step, 2_000_000, 12.3456, 0.1, 123_456.0))
    lines = screen(console).splitlines()
    assert len(lines) == 2
    assert "1,000/2,000,000 steps" in lines[0]
    assert all(len(line) <= 80 for line in lines)


def test_a_phase_that_begins_again_has_one_bar():
    console, _ = console_of()
    with console:
        for message in [*MESSAGES[:4], *MESSAGES[:4]]:  # a worker was lost in between
            console.on(message)
        assert screen(console).count("phase 2 of 3") == 1
        console.on(MESSAGES[-1])
        assert screen(console).strip() == ""


def test_a_status_is_shown_until_the_next_phase_with_its_time_if_it_takes_long(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console, out = console_of()
    with console:
        console.on(Status("encoding model.dcz"))
        assert screen(console).rstrip().endswith("encoding model.dcz")
        now[0] += 12.0
        assert screen(console).rstrip().endswith("encoding model.dcz (12 s)")
        assert "encoding model.dcz" in out.getvalue()  # at once, not when the thread comes to it
        console.on(PHASE)
        assert "encoding" not in screen(console)
        console.status("writing report.html")
        console.status(None)
        assert "report.html" not in screen(console)


def test_a_terminal_without_unicode_gets_another_spinner():
    raw = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    console = Console(Terminal(file=raw, force_terminal=True, width=80, color_system=None))
    with console:
        for message in MESSAGES:
            console.on(message)
    raw.flush()


def test_letters_that_the_output_lacks_are_replaced(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console = Console()
    console.show(Table("a – b", ("x", "y"), [("1 ± 2", "3")]))  # noqa: RUF001
    sys.stdout.flush()
    assert b"1 ? 2" in raw.getvalue()


@pytest.mark.parametrize("method", ["write", "flush"])
def test_a_full_disk_behind_the_output_ends_no_run(method, monkeypatch, tmp_path):
    full = (tmp_path / "out").open("w")

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    stream = types.SimpleNamespace(
        write=full.write, flush=full.flush, fileno=full.fileno, isatty=full.isatty, encoding="utf-8"
    )
    setattr(stream, method, fail)
    monkeypatch.setattr("sys.stdout", stream)
    with Console() as console:
        for message in MESSAGES:
            console.on(message)
    os.write(full.fileno(), b"to nowhere")
    assert (tmp_path / "out").read_text() == ""


def test_a_process_without_standard_output_can_run(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    with Console() as console:
        for message in MESSAGES:
            console.on(message)


def test_lines_break_between_words_and_paths_stay_whole():
    console, out = console_of(width=60)
    console.on(MESSAGES[5])
    path = "run directory: " + "/a_long_folder" * 6
    console.on(Notice(path))
    first, second, *rest = out.getvalue().splitlines()
    assert first == "prune epoch 2: loss 0.2500 (validation 0.1000), accuracy"
    assert second == "  97.50%, sparsity 92.0%, 512 samples/s"
    assert rest == [path]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (PhaseStarted(0, "train", "train", 1, 1, 7, 0.0), "train: 1 epoch, 1 step, 7 trainable"),
        (PhaseStarted(0, "again", "train", 2, 4, 7, 0.0), "again (train): 2 epochs"),
        (PhaseStarted(0, "prune", "prune", 0, 0, 7, 0.0), "prune: no training"),
        (RunStarted(1, "cpu", 9, 1, 1, 1), "1 worker on cpu"),
        (
            RoundEnded("p", RoundRecord(2, 0.9, {"accuracy": 0.97}, 0.1, False, "no more", False)),
            "p round 2: sparsity 90.00%, accuracy 97.00%: beyond the limit, reverted to the last "
            "accepted weights; last round: no more",
        ),
        (
            RoundEnded("p", RoundRecord(2, 0.9, {"accuracy": 0.97}, 0.1, True, "")),
            "97.00%: accepted",
        ),
    ],
)
def test_lines(message, line):
    assert line in describe(message)


def test_pace_knows_nothing_before_the_second_report(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    pace = Pace()
    pace.start_phase(0, 100)
    assert pace.phase_left() is pace.run_left() is None
    pace.step(40)  # resumed within the phase
    assert pace.phase_left() is None
    now[0] = 5.0
    pace.step(50)
    assert pace.phase_left() == 25.0
    assert pace.run_left() is None  # the steps of other phases are not known
    pace.plan((100, 0, 30))
    assert pace.run_left() == 40.0
    pace.start_phase(2, 30)  # its steps may take another time
    assert pace.run_left() is None


TABLE = Table(
    "A title",
    ("layer", "values", "nonzero", "settings", "bytes"),
    [("a_very_long_name_of_a_layer.weight", "1,000", "10", "a=1, b=2, c=3 " * 4, "123,456,789")],
    "a caption",
    optional=("nonzero", "values"),
    prose=("settings",),
)


def printed(width):
    terminal = Terminal(file=io.StringIO(), width=width)
    terminal.print(rich_table(TABLE, width))
    return terminal.file.getvalue()


@pytest.mark.parametrize("width", [160, 100, 80, 60])
def test_numbers_are_never_cut_and_no_line_is_too_long(width):
    text = printed(width)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    assert "123,456,789" in text
    assert re.search(r"a_very_long\w*", text)
    assert "a=1, b=2" in text


def test_a_narrow_terminal_leaves_out_columns_and_names_them():
    assert "too narrow" not in printed(160)
    assert "nonzero" in printed(160)
    narrow = printed(80)
    assert "too narrow for: nonzero" in narrow
    (header,) = [line for line in narrow.splitlines() if line.startswith("layer")]
    assert "nonzero" not in header


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1720000, "1.72 MB"), (2.5e10, "25 GB")]
)
def test_bytes_for_people(count, text):
    assert megabytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.012345678901234567, "0.01235"), (1e-5, "1e-05"), (3, "3"), (True, "True"), ("a", "a")],
)
def test_settings_for_people(value, text):
    assert significant(value) == text
