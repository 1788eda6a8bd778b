"""Versions of the libraries and the platform, as written into every run."""

import platform
from importlib import metadata
from typing import Any

LIBRARIES = ("ray", "torch", "transformers", "safetensors", "numpy", "pyarrow")


def environment() -> dict[str, Any]:
    """Return versions and platform, as they are written into every run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in LIBRARIES},
    }
