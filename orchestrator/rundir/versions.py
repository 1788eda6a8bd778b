"""Versions of the libraries and the platform, as written into every run."""

import platform
from importlib import metadata
from typing import Any

LIBRARIES = ("ray", "torch", "transformers", "safetensors", "numpy", "pyarrow")
OPTIONAL = ("compressed-tensors",)  # an extra, which reads quantised results


def environment() -> dict[str, Any]:
    """Return versions and platform, as they are written into every run."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: metadata.version(name) for name in LIBRARIES},
        **{name: metadata.version(name) for name in OPTIONAL if _is_installed(name)},
    }


def _is_installed(name: str) -> bool:
    return any(True for _ in metadata.Distribution.discover(name=name))
