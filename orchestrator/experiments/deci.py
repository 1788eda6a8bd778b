"""A result once more, in the form of DeciLM and Nemotron-NAS, which vLLM and llama.cpp read.

It holds FFN widths by layer. Both engines take multiples of 256, so units of zeros are added.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from actors.storage.checkpoint import INDEX, Checkpoint
from actors.storage.contents import CONFIG, TAKEN_OVER
from actors.storage.deci import (
    DECI_CODE,
    check_padded,
    deci_code,
    deci_config,
    index_of,
    padded_shapes,
    write_padded,
)
from actors.storage.files import Directory, FileEntry
from orchestrator.report.serving import serving, serving_lines
from orchestrator.rundir.finished import finished_report
from planners.errors import ConfigError
from planners.model.cost import model_parameters
from planners.serving import deci_widths

FOLDER = "deci"
SUMS = "SHA256SUMS"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeciExport:
    """What was written.

    Attributes:
        uri: the directory.
        widths: FFN width of each layer.
        before: the same in the result.
        parameters: of the result.
        parameters_added: zeros.
        config: its ``config.json``.
    """

    uri: str
    widths: tuple[int, ...]
    before: tuple[int, ...]
    parameters: int
    parameters_added: int
    config: Mapping[str, Any]


def export_deci(run: Directory, out: str) -> DeciExport:
    """Write the result of a READY run in the deci form; see `write_deci`.

    Args:
        run: the run.
        out: the directory to write; ``deci`` in the run's if empty.

    Raises:
        ConfigError: the run is not READY, or as `write_deci`.
        StorageError: as `write_deci`.
    """
    if finished_report(run) is None:
        raise ConfigError(
            f"{run.uri}: is not READY, so it has no result to export",
            hint=f"finish it with the command that began it, with --out {run.uri}",
        )
    return write_deci(Checkpoint(run.below("model")), Directory(out or run.below(FOLDER)))


def write_deci(source: Checkpoint, target: Directory) -> DeciExport:
    """Write a model in the deci form, and compare what was written with it.

    An older export in the same directory is replaced.

    Raises:
        ConfigError: the form cannot express the model, or the directory holds another one.
        StorageError: a file cannot be written, or does not read as written.
    """
    widths = deci_widths(source.shape, source.form, source.config)
    _claim(target)
    shapes = padded_shapes(source, widths)
    files = list(write_padded(source, target, widths))
    check_padded(source, target, files)
    stored = sum(prod(place.entry.shape) for place in source.locations.values())
    found = DeciExport(
        uri=target.uri,
        widths=widths,
        before=tuple(layer.intermediate for layer in source.form.layers),
        parameters=model_parameters(source.shape, source.form),
        parameters_added=sum(map(prod, shapes.values())) - stored,
        config=deci_config(source, widths),
    )
    texts = {
        INDEX: _json(index_of(source, shapes)),
        DECI_CODE: deci_code(),
        "README.md": _card(found).encode(),
        CONFIG: _json(found.config),  # last: a directory without it is no model
    }
    own = source.directory
    present = [name for name in TAKEN_OVER if own.size(name) is not None]
    files += [target.write(name, own.read(name)) for name in present]
    files += [target.write(name, text) for name, text in texts.items()]
    target.write(SUMS, _sums(files))
    return found


def _claim(target: Directory) -> None:
    """Refuse a directory that holds another model; an older export is none from here on."""
    if target.size(CONFIG) is None:
        return
    if target.size(DECI_CODE) is None:
        raise ConfigError(f"--out {target.uri}: holds another model", hint="give another directory")
    target.delete(CONFIG)


def _sums(files: list[FileEntry]) -> bytes:
    """Return the hashes as ``sha256sum -c`` reads them."""
    return "".join(f"{file.sha256}  {file.path}\n" for file in files).encode()


def _card(found: DeciExport) -> str:
    commands = "\n".join(serving_lines(serving(found.config), "."))
    return f"""---
tags: [compressed]
---
# The deci form of a compressed model

A Llama whose layers have FFNs of {min(found.widths):,} to {max(found.widths):,} units, with the
config of DeciLM and Nemotron-NAS. It computes what the result that it was made from computes:
to its {found.parameters:,} parameters, {found.parameters_added:,} zeros were added, which make
every width a multiple of 256.

{commands}

`{DECI_CODE}` is the class of the config, and no other code is needed.
`sha256sum -c {SUMS}` checks the files. The licence of the original model applies to these weights.
"""


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode()
