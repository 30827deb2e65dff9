"""Show, verify and decode compressed models.

    python -m trainer.artifact show FILE
    python -m trainer.artifact verify FILE
    python -m trainer.artifact decode FILE OUT.safetensors

--max-bytes=N raises the limit on the size of the decoded tensors.
--coder=PACKAGE.MODULE.CLASS names the coder of your own that coded the layers; what a file itself
names is never imported. Exit codes: 0 done, 1 the file is damaged or cannot be read or written, 2
wrong arguments.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import safetensors.torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from trainer.artifact.container import ArtifactError
from trainer.artifact.read import Description, describe, loads
from trainer.compress.coding import Coder
from trainer.config.instantiate import build_object
from trainer.errors import ConfigError

_METADATA = "__metadata__"  # a reserved name of safetensors
_WIDE = 1000  # columns if the output is not a terminal: one line for each tensor


def main(arguments: Sequence[str]) -> int:
    """Execute the command line and return the exit code."""
    options = _parser().parse_args(arguments)
    path = options.file
    if options.most_bytes is not None:
        print("--most-bytes is now called --max-bytes", file=sys.stderr)
        options.max_bytes = options.most_bytes
    try:
        coder = (
            build_object("--coder", {"_target_": options.coder}, object) if options.coder else None
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    limits = options.max_bytes, cast(Coder | None, coder)
    try:
        content = Path(options.file).read_bytes()
        if options.command == "show":
            _show(options.file, len(content), describe(content, *limits))
            return 0
        tensors = loads(content, *limits)
        if options.command == "verify":
            print(f"{options.file}: whole, {len(tensors)} tensors, {len(content):,} bytes")
            return 0
        if _METADATA in tensors:
            raise ArtifactError(f"a tensor is named {_METADATA}, which safetensors cannot hold")
        path = options.out
        _write(tensors, Path(options.out))
    except (ArtifactError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        print(f"{path}: {reason or error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.artifact", description="Compressed models (.dcz)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, summary in (
        ("show", "what the file holds, tensor by tensor"),
        ("verify", "decode everything; exit code 0 if the file is whole"),
        ("decode", "write the weights as a safetensors file"),
    ):
        command = commands.add_parser(name, help=summary)
        command.add_argument("file", metavar="FILE")
        command.add_argument(
            "--max-bytes", type=int, metavar="N", help="maximum bytes of the decoded tensors"
        )
        command.add_argument(
            "--coder", metavar="CLASS", help="dotted path of your own coder, if the file needs one"
        )
        command.add_argument("--most-bytes", type=int, help=argparse.SUPPRESS)  # the old name
        if name == "decode":
            command.add_argument("out", metavar="OUT.safetensors")
    return parser


def _coder(path: str | None) -> Coder | None:
    """An object of the class that `path` names. Raises ConfigError."""
    if path is None:
        return None
    return cast(Coder, build_object("--coder", {"_target_": path}, object))


def _show(name: str, size: int, found: Description) -> None:
    dense = 4 * found.parameters
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDE
    for key, value in found.about.items():
        console.print(f"{_plain(key)}: {_plain(str(value))}")
    table = Table(
        title=f"{name}: {size:,} bytes, {dense / size:.1f}x smaller", title_justify="left"
    )
    table.add_column("tensor", overflow="fold")
    table.add_column("kind", overflow="fold")
    table.add_column("shape", justify="right", overflow="fold")
    for title in ("not zero", "kept", "distinct", "bits", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            _plain(layer["name"]),
            _plain(layer["kind"]),
            " x ".join(map(str, layer["shape"])),
            f"{layer['nonzero']:,}",
            f"{layer['nonzero'] / max(1, layer['weights']):.1%}",
            "" if layer["distinct"] is None else f"{layer['distinct']:,}",
            str(layer["bits"]),
            f"{layer['bytes']:,}",
        )
    table.add_row("(header, checksums)", "", "", "", "", "", "", f"{found.frame:,}")
    console.print(table)


def _plain(text: str) -> str:
    """Text without control characters: a file may come from anybody."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _write(tensors: dict[str, Tensor], out: Path) -> None:
    if out.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    aside = out.with_name(f"{out.name}.part")
    try:
        aside.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
        os.replace(aside, out)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    print(f"{out}: {len(tensors)} tensors")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
