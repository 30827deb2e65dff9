"""The id of a run in services such as Weights & Biases and MLflow."""

import uuid
from pathlib import Path

from trainer.store.files import atomic_write


def run_id(folder: Path) -> str:
    """The id of a run; created with its first sink, and kept in the run directory for resumes."""
    path = folder / "run_id"
    if not path.exists():
        atomic_write(path, lambda file: file.write(uuid.uuid4().hex.encode()))
    return path.read_text(encoding="ascii")
