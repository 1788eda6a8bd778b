"""The modelling file that travels with results, and its classes for each model type."""

import functools
import importlib.util
import json
import sys
from importlib import resources
from importlib.abc import ExecutionLoader
from typing import Any

CODE = "modeling_compressed.py"
COMPRESSED = "compress_cluster"  # model_type of our own results, in memory
LINE = 'STOCK = "llama"'  # of the file, which names the model type


def code_of(model_type: str) -> bytes:
    """Return the file that travels with the results of a model type."""
    source = resources.files("actors.modeling").joinpath(CODE).read_text(encoding="utf-8")
    assert source.count(LINE) == 1  # it is our own file
    return source.replace(LINE, f"STOCK = {json.dumps(model_type)}").encode()


@functools.cache
def classes(model_type: str) -> Any:
    """Return that file as a module, which has ``CompressedConfig`` and ``CompressedForCausalLM``.

    Raises:
        KeyError: transformers has no such model type.
    """
    name = f"actors.modeling.compressed_{model_type}"
    loader = _Loader(model_type)
    spec = importlib.util.spec_from_file_location(name, loader=loader)
    assert spec is not None  # it has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader.exec_module(module)
    return module


class _Loader(ExecutionLoader):
    def __init__(self, model_type: str) -> None:
        self._model_type = model_type

    def get_filename(self, fullname: str) -> str:
        """Return the file that a traceback shows."""
        del fullname
        return str(resources.files("actors.modeling").joinpath(CODE))

    def get_source(self, fullname: str) -> str:
        """Return the source of the module."""
        del fullname
        return code_of(self._model_type).decode()
