"""The code of docs/hardware.md runs, block after block."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs" / "hardware.md"


def test_the_examples_run(capsys) -> None:
    torch.manual_seed(0)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    printed = capsys.readouterr().out
    assert "dense" in printed
    assert "Convolve" in printed
    assert " J\n" in printed
