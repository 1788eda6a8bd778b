"""Parse, validate and write the header of a safetensors file; its source is not trusted.

Format: 8 bytes little-endian length N, N bytes of JSON ``{name: {dtype, shape, data_offsets}}``,
then the data. No size in a header is used to allocate or read before it has been checked.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from actors.storage.quoting import shown
from planners.errors import ModelError

# Room for some 35,000 tensors. JSON takes up to 40 times its bytes once it is parsed, so this is
# also what keeps a hostile header below 1 GB; the reference reader allows 100 MB.
MAX_HEADER_BYTES = 2**22
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1,
}  # fmt: skip
NARROW = ("F8", "F6", "F4")  # dtypes of quantised weights
MAX_DIMS = 8
MAX_BYTES = 2**62  # of a tensor, dims of 0 counted as 1: what a reader's integers can hold


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Position of a tensor in its file.

    Attributes:
        dtype: as written in the header, e.g. ``BF16``.
        shape: dims, each >= 0.
        start: first byte, from the beginning of the file.
        size: bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def parse_length(prefix: bytes | bytearray, *, file_bytes: int, where: str) -> int:
    """Return the header's length from the first 8 bytes of a file.

    Raises:
        ModelError: the file cannot be a safetensors file.
    """
    if len(prefix) < 8:  # noqa: PLR2004 the format's prefix
        raise ModelError(f"{where}: {len(prefix)} bytes are too short for a safetensors file")
    length = int.from_bytes(prefix[:8], "little")
    if length + 8 > file_bytes:
        raise ModelError(
            f"{where}: not a safetensors file, or truncated: its header claims {length} bytes, "
            f"the file has {file_bytes}"
        )
    if length > MAX_HEADER_BYTES:
        raise ModelError(
            f"{where}: its header has {length} bytes, over the limit of {MAX_HEADER_BYTES}",
            hint="save the model in several files: save_pretrained(DIR, max_shard_size='5GB')",
        )
    return length


def parse_header(data: bytes | bytearray, *, file_bytes: int, where: str) -> dict[str, TensorEntry]:
    """Return name -> entry of all tensors of a file.

    Args:
        data: the JSON part.
        file_bytes: bytes of the whole file.
        where: the file's name, for errors.

    Raises:
        ModelError: not JSON, an entry is malformed, or the entries do not tile the data exactly.
    """
    try:
        header = json.loads(data.decode(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{where}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(header, dict) or data[:1] != b"{":
        raise ModelError(f"{where}: the safetensors header is not a JSON object")
    _check_metadata(header.pop("__metadata__", {}), where=where)
    begin = 8 + len(data)
    entries = {
        name: _entry(value, begin=begin, where=f"{where}: {shown(name)}")
        for name, value in header.items()
    }
    expected = begin
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != expected:
            raise ModelError(
                f"{where}: {shown(name)} begins at byte {entry.start}, not at {expected}: "
                "tensors overlap or leave a gap"
            )
        expected += entry.size
    if expected != file_bytes:
        raise ModelError(
            f"{where}: truncated or padded: its tensors end at byte {expected}, "
            f"the file has {file_bytes}"
        )
    return entries


def _check_metadata(metadata: object, *, where: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelError(
            f"{where}: __metadata__ of the safetensors header must map strings to strings"
        )


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def _entry(value: object, *, begin: int, where: str) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ModelError(f"{where}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        known = ", ".join(DTYPE_BYTES)
        raise ModelError(
            f"{where}: dtype {shown(dtype)} is not supported; supported: {known}",
            hint="quantised checkpoints cannot be compressed; use the original weights"
            if isinstance(dtype, str) and dtype.startswith(NARROW)
            else "",
        )
    width = DTYPE_BYTES[dtype]
    if (
        not _natural_numbers(shape)
        or len(shape) > MAX_DIMS
        or prod(max(dim, 1) for dim in shape) * width > MAX_BYTES
    ):
        raise ModelError(
            f"{where}: shape {shown(shape)} is not a list of at most {MAX_DIMS} valid dimensions"
        )
    if not _natural_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004 begin, end
        raise ModelError(f"{where}: data_offsets {shown(offsets)} are not [begin, end]")
    size = prod(shape) * width
    if offsets[1] - offsets[0] != size:
        raise ModelError(
            f"{where}: shape {shape} of {dtype} needs {size} bytes, "
            f"data_offsets give {offsets[1] - offsets[0]}"
        )
    return TensorEntry(dtype=dtype, shape=tuple(shape), start=begin + offsets[0], size=size)


def _natural_numbers(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_BYTES for n in value
    )


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> bytes:
    """Return length and JSON for a file with these tensors (dtype, shape) in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begins aligned
    return len(text).to_bytes(8, "little") + text
