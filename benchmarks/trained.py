"""The trained models, with their tokens, that some results are made with: they are not public."""

import os
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

from result_file import ROOT

SHARED = ROOT.parent / "shared"


def at_hand(*models: str) -> bool:
    """Return whether these models are here, and say it where they are not."""
    missing = [name for name in models if not (SHARED / "models" / name).is_dir()]
    if missing:
        print(
            f"skipped: it needs {', '.join(missing)} in ../shared/models and the stored tokens in "
            "../shared/reference, which a fresh clone has not"
        )
    return not missing


def stored(model: str, *, sequences: int | None = None) -> dict[str, Any]:
    """Return the recipe's keys for a model and its stored tokens, on the CPU.

    Args:
        model: its name.
        sequences: of calibration and of evaluation; all if None.
    """
    tokens = f"tokens:{SHARED}/reference/{model}"
    return {
        "model": str(SHARED / "models" / model),
        "calibration.source": f"{tokens}.calibration.safetensors",
        "calibration.sequences": sequences,
        "evaluation.source": f"{tokens}.evaluation.safetensors",
        "evaluation.sequences": sequences,
        "device": "cpu",
    }


def nobody(event: Mapping[str, Any]) -> None:
    """Hear of an event and do nothing."""
    del event


def with_code_apart(main: Callable[[], None]) -> None:
    """Call ``main``; transformers copies the code that travels with results to a folder of its own.

    Without it that code would go to the home directory.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-code-") as modules:
        os.environ["HF_MODULES_CACHE"] = modules
        os.environ["HF_HUB_OFFLINE"] = "1"
        main()
