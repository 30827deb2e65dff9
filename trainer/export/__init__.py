"""Exports trained models to ONNX files, and runs them in onnxruntime.

The packages that this needs are an extra: pip install '.[onnx]' in the checkout.
"""

import importlib.util

from trainer.errors import ConfigError

NEEDED = ("onnx", "onnxscript", "onnxruntime")


def check_installed() -> None:
    """Raises ConfigError if a package is missing."""
    missing = [name for name in NEEDED if not _importable(name)]
    if missing:
        raise ConfigError(
            f"export.onnx=true: {', '.join(missing)} cannot be imported; install it with "
            "pip install '.[onnx]' in the checkout of trainer"
        )


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # set to None in sys.modules
        return False
