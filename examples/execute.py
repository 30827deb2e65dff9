"""Execute the notebooks, and store what their cells show.

    python examples/execute.py [NAME.ipynb ...]

The tests execute them likewise, with fewer samples and without storing anything.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

HERE = Path(__file__).resolve().parent


def execute(path: Path, folder: Path, **parameters: Any) -> nbformat.NotebookNode:
    """Execute a notebook.

    Args:
        path: The notebook.
        folder: Working directory of its kernel.
        parameters: Values to assign instead of those in the cell with the tag `parameters`.

    Returns:
        The notebook with its outputs, without traces of time and place.
    """
    notebook = nbformat.read(path, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    shipped = cell.source
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(folder)}}
    ).execute()
    cell.source = shipped
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _tidy(cell.outputs, str(folder))
    return notebook


def _tidy(outputs: list[nbformat.NotebookNode], folder: str) -> list[nbformat.NotebookNode]:
    """Outputs of a cell without live displays that have ended, and with text in one piece."""
    tidy: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "display_data" and output.data.get("text/html") == "":
            continue
        if output.output_type == "stream":
            output.text = output.text.replace(f"{folder}/", "")
            if tidy and tidy[-1].get("name") == output.name:
                tidy[-1].text += output.text
                continue
        tidy.append(output)
    return tidy


def main() -> None:
    names = sys.argv[1:] or sorted(path.name for path in HERE.glob("*.ipynb"))
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(HERE / name, Path(folder))
        nbformat.write(notebook, HERE / name)
        print(f"{name}: {(HERE / name).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
