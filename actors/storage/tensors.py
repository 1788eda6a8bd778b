"""Tensors in safetensors files: read by byte range, written as a stream."""

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from actors.devices.transfer import host_buffer, whole
from actors.numerics.packed import all_finite
from actors.storage.files import Directory, FileEntry
from actors.storage.headers import TensorEntry, header_bytes, parse_header, parse_length
from planners.errors import ModelError, NumericsError, StorageError
from planners.overflow import OTHER_WEIGHTS, overflowed

TORCH_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip
NAME_OF = {dtype: name for name, dtype in TORCH_DTYPE.items()}
CHECKPOINT_METADATA = {"format": "pt"}  # without it transformers refuses a file
PIECE = 2**24  # elements converted at a time while a tensor is written in another dtype


def read_header(directory: Directory, name: str) -> dict[str, TensorEntry]:
    """Return the checked header of a file.

    Raises:
        ModelError: there is no such file, or it is not a valid safetensors file.
    """
    file_bytes = directory.size(name)
    if file_bytes is None:
        raise ModelError(f"{directory.path(name)}: there is no such file")
    where = directory.path(name)
    prefix = directory.read_range(name, 0, min(8, file_bytes))
    length = parse_length(prefix, file_bytes=file_bytes, where=where)
    return parse_header(directory.read_range(name, 8, length), file_bytes=file_bytes, where=where)


def read_tensor(
    directory: Directory,
    name: str,
    entry: TensorEntry,
    *,
    rows: tuple[int, int] | None = None,
    device: str = "cpu",
) -> Tensor:
    """Return a tensor, or rows ``[a, b)`` of it, in new memory of the host.

    ``device`` is the one that it will be copied to.
    """
    shape, start, size = entry.shape, entry.start, entry.size
    if rows is not None:
        row_bytes = size // max(shape[0], 1)
        start, size = start + rows[0] * row_bytes, (rows[1] - rows[0]) * row_bytes
        shape = (rows[1] - rows[0], *shape[1:])
    if size == 0:
        return torch.empty(shape, dtype=TORCH_DTYPE[entry.dtype])
    data = host_buffer(size, device)
    directory.read_into(name, start, memoryview(data.numpy().data))
    return data.view(TORCH_DTYPE[entry.dtype]).reshape(shape)


def read_tensors(directory: Directory, name: str) -> dict[str, Tensor]:
    """Return all tensors of one of our own files."""
    header = read_header(directory, name)
    return {key: read_tensor(directory, name, entry) for key, entry in header.items()}


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one of our own files, each read when it is asked for."""

    def __init__(self, directory: Directory, name: str) -> None:
        """Read what there are."""
        self._directory, self._name = directory, name
        self._header = read_header(directory, name)

    def __getitem__(self, key: str) -> Tensor:
        """Read one."""
        return read_tensor(self._directory, self._name, self._header[key])

    def __iter__(self) -> Iterator[str]:
        """Return the names."""
        return iter(self._header)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._header)


def damaged(directory: Directory, file: FileEntry) -> StorageError:
    """Return the error of a file that is not as it was written."""
    return StorageError(
        f"{directory.path(file.path)}: does not match the hash in its record",
        hint="run the same command again with --verify-hashes, which recomputes such files",
    )


def map_tensors(directory: Directory, file: FileEntry) -> dict[str, Tensor]:
    """Return all tensors of one of our own files; a local file is memory-mapped.

    Changes to them stay in this process.

    Raises:
        StorageError: the file does not match its hash.
    """
    header = read_header(directory, file.path)
    pages: mmap.mmap | bytearray
    if directory.is_local:
        with Path(directory.path(file.path)).open("rb") as local:
            pages = mmap.mmap(local.fileno(), 0, access=mmap.ACCESS_COPY)
    else:
        pages = directory.read_range(file.path, 0, file.bytes)
    if hashlib.sha256(pages).hexdigest() != file.sha256:
        raise damaged(directory, file)
    found = {}
    for key, entry in header.items():
        dtype = TORCH_DTYPE[entry.dtype]
        count = entry.size // dtype.itemsize
        flat = torch.empty(0, dtype=dtype)
        if count:
            flat = torch.frombuffer(pages, dtype=dtype, count=count, offset=entry.start)
        found[key] = flat.reshape(entry.shape)
    return found


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, without a copy if it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data)


def require_finite(tensor: Tensor) -> None:
    """Refuse a result with entries that are NaN or infinite.

    Raises:
        NumericsError: it has such an entry.
    """
    whole = tensor.is_floating_point() and tensor.dtype.itemsize > 1
    if whole and not all_finite(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise NumericsError(
            f"the result has entries that are NaN or infinite{overflowed(dtype)}",
            hint=OTHER_WEIGHTS if dtype == "float16" else "",
        )


def described(tensor: Tensor) -> dict[str, object]:
    """Return sha256, shape and dtype of a tensor, with which a reader can compare it.

    Raises:
        NumericsError: an entry is NaN or infinite.
    """
    require_finite(tensor)
    digest = hashlib.sha256(tensor_bytes(tensor))
    return _facts(digest, NAME_OF[tensor.dtype], tuple(tensor.shape))


def _facts(digest: "hashlib._Hash", dtype: str, shape: tuple[int, ...]) -> dict[str, object]:
    return {"sha256": digest.hexdigest(), "shape": list(shape), "dtype": dtype}


def write_tensors(
    directory: Directory,
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    stored: Mapping[str, torch.dtype] | None = None,
) -> FileEntry:
    """Write tensors as one file, one at a time, in the order of their names.

    Those that are divided over workers are gathered one at a time; the other workers call `whole`
    in the same order.

    Args:
        directory: where.
        name: of the file.
        tensors: name -> tensor.
        metadata: of the header.
        stored: name -> dtype in the file, for tensors that are converted.
    """
    ordered = dict(sorted(tensors.items()))
    dtypes = {key: (stored or {}).get(key, t.dtype) for key, t in ordered.items()}
    layout = {key: (NAME_OF[dtypes[key]], tuple(t.shape)) for key, t in ordered.items()}
    with directory.writing(name) as stream:
        stream.write(header_bytes(layout, metadata or {}))
        for key, tensor in ordered.items():
            for piece in _pieces(whole(tensor), dtypes[key]):
                stream.write(tensor_bytes(piece))
    return stream.entry(name)


def write_weights(
    directory: Directory, name: str, tensors: Mapping[str, Tensor]
) -> tuple[FileEntry, dict[str, object]]:
    """Write tensors as a file of a checkpoint; return it, and tensor -> what `described` returns.

    File and tensors are hashed while they are written. That their entries are finite is left to the
    caller, who may still have them on a device.
    """
    ordered = dict(sorted(tensors.items()))
    layout = {key: (NAME_OF[t.dtype], tuple(t.shape)) for key, t in ordered.items()}
    digests = {key: hashlib.sha256() for key in ordered}
    with directory.writing(name) as stream:
        stream.write(header_bytes(layout, CHECKPOINT_METADATA))
        for key, tensor in ordered.items():
            stream.write(tensor_bytes(tensor), digests[key])
    entry = stream.entry(name)
    return entry, {key: _facts(digests[key], *layout[key]) for key in ordered}


def _pieces(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    if tensor.dtype == dtype:
        yield tensor
    else:
        yield from (piece.to(dtype) for piece in torch.split(tensor.flatten(), PIECE))


def write_rows(
    directory: Directory, name: str, key: str, blocks: Iterable[Tensor], *, shape: tuple[int, int]
) -> tuple[FileEntry, dict[str, object]]:
    """Write one large matrix from blocks of rows, without having all of it in memory.

    Returns:
        The file, and what `described` returns for the matrix.

    Raises:
        NumericsError: an entry is NaN or infinite.
    """
    digest, dtype = hashlib.sha256(), ""
    with directory.writing(name) as stream:
        for number, block in enumerate(blocks):
            require_finite(block)
            if number == 0:
                dtype = NAME_OF[block.dtype]
                stream.write(header_bytes({key: (dtype, shape)}, CHECKPOINT_METADATA))
            stream.write(tensor_bytes(block), digest)
    return stream.entry(name), _facts(digest, dtype, shape)
