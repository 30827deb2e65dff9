"""Look into, check and unpack a compressed model.

    python -m trainer.artifact show FILE
    python -m trainer.artifact verify FILE
    python -m trainer.artifact decode FILE OUT.safetensors

Exit codes: 0 done, 1 the file is damaged or cannot be read or written, 2 wrong arguments.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
from rich.console import Console
from rich.table import Table

from trainer.artifact.container import ArtifactError
from trainer.artifact.read import Description, describe, loads


def main(arguments: Sequence[str]) -> int:
    """Do what the command line says and return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        content = Path(options.file).read_bytes()
        if options.command == "show":
            _show(options.file, len(content), describe(content))
        elif options.command == "verify":
            tensors = loads(content)
            print(f"{options.file}: whole, {len(tensors)} tensors, {len(content):,} bytes")
        else:
            _decode(content, Path(options.out))
    except (ArtifactError, OSError) as error:
        print(f"{options.file}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.artifact", description="Compressed models (.dcz)."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, told in (
        ("show", "what the file holds, tensor by tensor"),
        ("verify", "decode everything; exit code 0 if the file is whole"),
        ("decode", "write the weights as a safetensors file"),
    ):
        command = commands.add_parser(name, help=told)
        command.add_argument("file", metavar="FILE")
        if name == "decode":
            command.add_argument("out", metavar="OUT.safetensors")
    return parser


def _show(name: str, size: int, found: Description) -> None:
    dense = 4 * found.parameters
    console = Console(highlight=False, markup=False)
    for key, value in found.about.items():
        console.print(f"{key}: {value}")
    table = Table(
        title=f"{name}: {size:,} bytes, {dense / size:.1f}x smaller", title_justify="left"
    )
    table.add_column("tensor")
    table.add_column("kind")
    for title in ("shape", "not zero", "kept", "bits", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in found.layers:
        table.add_row(
            layer["name"],
            layer["kind"],
            " x ".join(map(str, layer["shape"])),
            f"{layer['nonzero']:,}",
            f"{layer['nonzero'] / max(1, layer['weights']):.1%}",
            str(layer["bits"]),
            f"{layer['bytes']:,}",
        )
    console.print(table)


def _decode(content: bytes, out: Path) -> None:
    tensors = {name: tensor.clone() for name, tensor in loads(content).items()}
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
