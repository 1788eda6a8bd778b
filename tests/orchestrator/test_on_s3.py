"""A run whose model and directory are on an object store: the same bytes as on a disk."""

import json
import os
import shutil

import pytest

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.rundir import READY, finished_report
from planners.errors import StorageError
from tests.bad_input.warm import command_line
from tests.builders import (
    DeadDriverError,
    compress_local,
    prepared_run,
    result_files,
    run_local,
    save_model,
    worker_gib,
)
from tests.stores import KEYS, Fault


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    compress_local(model, out)
    return result_files(out)


def upload(folder, uri):
    target = Directory(uri)
    for path in folder.rglob("*"):
        if path.is_file():
            target.write(str(path.relative_to(folder)), path.read_bytes())
    return uri


def stored(uri):
    """Return name -> bytes of all files of a result on a store, but for what names its source."""
    result = Directory(Directory(uri).below("model"))
    return {name: result.read(name) for name in result.names()}


def without_source(files):
    """Return a result without the two files that say where its model came from."""
    return {k: v for k, v in files.items() if k not in ("config.json", "README.md")}


def on_store(model, uri, **how):
    """Return the recipe of a run of a model on a store, with its tokens from the disk."""
    tokens = {
        "calibration": {"source": f"tokens:{model}/tokens/calibration.safetensors"},
        "evaluation": {"source": f"tokens:{model}/tokens/evaluation.safetensors"},
    }
    return {"model": uri, **tokens, **how}
