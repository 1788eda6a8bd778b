"""The units of compression: each reads files, computes, and writes files. Nothing else is kept."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from actors import compete, methods, refit, sequential
from actors.behind import losses_behind
from actors.carry import turned_sums
from actors.damage import damage_curves
from actors.messages import OF_A_LAYER, CompressionJob, Done, UnitTask
from actors.storage.ahead import one_ahead
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory, FileEntry
from actors.storage.records import read_record
from actors.storage.tensors import (
    NAME_OF,
    described,
    map_tensors,
    read_tensors,
    require_finite,
    tensor_bytes,
    write_rows,
    write_tensors,
)
from actors.storage.tokens import tokens_from_parquet
from actors.sums import add_shards
from actors.transfer import to_device
from planners.errors import NumericsError
from planners.families import load as load_family
from planners.overflow import found_behind
from planners.weight_files import weight_files

ROWS = 8192  # vocabulary rows that are in memory at one time
SPECTRUM_SAMPLES = 256  # eigenvalues of a site that travel into its record


def do_unit(task: UnitTask, job: CompressionJob, *, run: Directory, device: str) -> Done:
    """Do one unit and return its files and the small numbers it found.

    Raises:
        NumericsError: statistics gave no usable numbers.
        ModelError: a weight is missing or not finite.
    """
    own = job.layer_options.get(task.index)
    if own and task.kind in OF_A_LAYER:
        job = replace(job, options={**job.options, **own})
    try:
        return KINDS[task.kind](task, job, run, device)
    except NumericsError as error:
        said = NumericsError(f"{task.unit}: {error}", hint=error.hint)
        raise found_behind(said, job.stream.dtype) from error


def basis(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Factor the statistics of one site of the residual stream, or of all sites into one basis."""
    last = 2 * job.shape.num_layers
    sites = range(last + 1) if task.index < 0 else [task.index]
    grams = [gram for site in sites if (gram := _site_gram(site, job)) is not None]
    return _factored([gram.to(device) for gram in grams], task, job, run)


def basis_sequential(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Factor one site of the residual stream behind a prefix that is sliced already."""
    gram = sequential.site_gram(task.index, job=job, run=run, device=device)
    return _factored([gram], task, job, run)


def _factored(grams: list[Tensor], task: UnitTask, job: CompressionJob, run: Directory) -> Done:
    where = f"site {task.index}" if task.index >= 0 else "all sites"
    keep_dim = _site_dims(job)[max(task.index, 0)]
    found = methods.load(job.method).factor(grams, keep_dim=keep_dim, where=where)
    tensors = {"vectors": found.vectors.cpu(), "values": found.values.cpu()}
    entry = write_tensors(run, f"basis/{task.unit}.safetensors", tensors)
    step = max(1, -(-len(found.values) // SPECTRUM_SAMPLES))
    values = {
        "energy_kept": found.energy_kept,
        "rung": found.rung,
        "dim": len(found.vectors),
        "keep_dim": keep_dim,
        "eigenvalues": [float(v) for v in found.values[::step]],
    }
    return (entry,), values


def layer(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Write one compressed layer."""
    checkpoint = Checkpoint.of(job)
    form = job.form.layers[task.index]
    weights = _on(device, one_ahead(checkpoint.stream_layer(task.index)))
    method = methods.load(job.method)
    if methods.spec(job.method).residual:
        bases = _bases(task.inputs, run, device)
        new = method.apply(weights, (bases[0], bases[len(bases) // 2], bases[-1]), form=form)
        values: dict[str, object] = {}
    else:
        sums = _on(device, read_statistics(job, task.index).items())
        if job.makers:
            start = checkpoint.form.layers[task.index]
            new, values = compete.compress(
                weights, sums, job=job, index=task.index, start=start, form=form
            )
        else:
            new, values = method.compress(
                weights, sums, shape=job.shape, form=form, options=job.options
            )
    family = load_family(job.shape.family)
    prefix = family.layer.format(i=task.index)
    named = {f"{prefix}.{family.below_layer(role)}": t.cpu() for role, t in new.items()}
    name = f"draft/layer-{task.index:05d}.safetensors"
    if task.kind != "draft":
        name = f"model/{weight_files(job.form)[task.unit]}"
    entry = write_tensors(run, name, named, metadata={"format": "pt"})
    return (entry,), {**values, "tensors": {k: described(t) for k, t in named.items()}}


def chosen(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Make a layer part of the result: refitted if that is the better model, else as drafted."""
    del device
    draft, refitted, losses = (read_record(run, name).values for name in task.inputs)
    folder, tensors = "draft", draft["tensors"]
    if losses["used"]:
        folder, tensors = "refit", refitted["tensors"]
    named = read_tensors(run, f"{folder}/layer-{task.index:05d}.safetensors")
    name = f"model/{weight_files(job.form)[task.unit]}"
    entry = write_tensors(run, name, named, metadata={"format": "pt"})
    said = {"used": losses["used"], "linears": refitted["linears"]}
    return (entry,), {**draft, "tensors": tensors, "refit": said}


def damage(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Measure what the cuts of a grid cost one layer; the curves travel, no file is written."""
    checkpoint = Checkpoint.of(job)
    weights = _on(device, one_ahead(checkpoint.stream_layer(task.index)))
    sums = _on(device, read_statistics(job, task.index).items())
    losses = None
    if job.options.get("damage") == "loss":
        # The probe is the first sequences of the calibration tokens.
        tokens = tokens_from_parquet(run.read(job.stream.tokens))[: len(sums["probe"])]
        ids = torch.from_numpy(tokens).to(device)
        losses = partial(losses_behind, checkpoint, task.index, ids=ids, device=device)
    curves = damage_curves(
        weights, sums, checkpoint, job=job, index=task.index, device=device, losses=losses
    )
    return (), {"curves": curves}


def losses(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Compute what truncation to the ranks of the job's form loses of each linear of a layer."""
    del run  # the job names the files of its statistics
    checkpoint = Checkpoint.of(job)
    weights = _on(device, one_ahead(checkpoint.stream_layer(task.index)))
    sums = _on(device, read_statistics(job, task.index).items())
    form = job.form.layers[task.index]
    return (), {
        "losses": methods.load(job.method).losses(weights, sums, form=form, options=job.options)
    }


def carried(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Turn the statistics of the step before, which only turned the residual stream, into ours."""
    former = job.former
    assert former is not None  # the driver plans such a unit behind a step only
    where = Directory(former.run_uri)
    statistics, *bases = task.inputs
    sums = _on(device, read_statistics(former, task.index).items())
    found = _bases(tuple(bases), where, device)
    weights = Checkpoint.of(former).read_layer(task.index)
    scales = {name: weights[f"{name}.weight"].to(device) for name in ("attn_norm", "mlp_norm")}
    new = turned_sums(sums, (found[0], found[len(found) // 2], found[-1]), scales=scales)
    name = f"stats/layer-{task.index:05d}.safetensors"
    entry = write_tensors(run, name, {k: v.cpu() for k, v in new.items()})
    values = read_record(where, statistics).values
    return (entry,), {k: values[k] for k in ("num_tokens", "taps", "influence") if k in values}


def embedding(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Write the embedding, in blocks of rows."""
    name = load_family(job.shape.family).embedding
    bases = _bases(task.inputs, run, device) if _is_residual(job) else ()

    def turn(rows: Tensor) -> Tensor:
        return methods.load(job.method).apply_embedding(rows, bases[0]) if bases else rows

    width = job.form.embedding_dim
    return _table(name, name, ("embedding", width), job, run, (device, turn))


def head(task: UnitTask, job: CompressionJob, run: Directory, device: str) -> Done:
    """Write the head in blocks of rows, unless it is the embedding's tensor, and the final norm."""
    family = load_family(job.shape.family)
    checkpoint = Checkpoint.of(job)
    norm_weight = None  # folded into the head by a step before
    if checkpoint.form.head_norm_weight:
        norm_weight = checkpoint.read(family.final_norm).to(device)
    bases = _bases(task.inputs, run, device) if _is_residual(job) else ()
    files: tuple[FileEntry, ...] = ()
    values: dict[str, object] = {}
    if not job.form.tied:
        source = family.embedding if checkpoint.form.tied else family.head

        def turn(rows: Tensor) -> Tensor:
            if not bases:
                return rows
            turned: Tensor = methods.load(job.method).apply_head(
                rows, bases[-1], norm_weight=norm_weight, native=job.form.native
            )
            return turned

        width = job.form.head_dim
        files, values = _table(source, family.head, ("head", width), job, run, (device, turn))
    if norm_weight is not None and job.form.head_norm_weight:
        scale = norm_weight if not bases else torch.ones(job.form.head_dim, dtype=norm_weight.dtype)
        tensors = {family.final_norm: scale.cpu()}
        name = f"model/{weight_files(job.form)['norm']}"
        norm_file = write_tensors(run, name, tensors, metadata={"format": "pt"})
        facts = {k: described(t) for k, t in tensors.items()}
        known = values.get("tensors", {})
        assert isinstance(known, dict)  # ours, written by _table
        files, values = (*files, norm_file), {"tensors": {**known, **facts}}
    return files, values


KINDS: Mapping[str, Callable[[UnitTask, CompressionJob, Directory, str], Done]] = {
    "statistics": add_shards,
    "basis": basis,
    "basis_shared": basis,
    "basis_sequential": basis_sequential,
    "damage": damage,
    "losses": losses,
    "carried": carried,
    "layer": layer,
    "draft": layer,
    "chosen": chosen,
    **refit.KINDS,
    **sequential.KINDS,
    "embedding": embedding,
    "head": head,
}


def _is_residual(job: CompressionJob) -> bool:
    return methods.spec(job.method).residual


def _site_dims(job: CompressionJob) -> list[int]:
    dims = [d for form in job.form.layers for d in (form.residual_in, form.residual_mid)]
    return [*dims, job.form.layers[-1].residual_out]


def _site_gram(site: int, job: CompressionJob) -> Tensor | None:
    """Return the gram of a site, which its own layer keeps; the last layer keeps the head's.

    None of the last site where the method does not ask for it.
    """
    owner = min(site // 2, job.shape.num_layers - 1)
    tap = "resid_out" if site == 2 * job.shape.num_layers else ("resid_attn", "resid_mlp")[site % 2]
    wanted = {s.tap: s for s in methods.spec(job.method).statistics(job.options)}
    return read_statistics(job, owner)[str(wanted[tap])] if tap in wanted else None


def _on(device: str, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: to_device(tensor, device) for name, tensor in named}


def read_statistics(job: CompressionJob, index: int) -> dict[str, Tensor]:
    """Return the sums of one layer: those of the run, and those of the artefact it reuses.

    Grams are packed; on a local disk they are the pages of its files and take no memory until they
    are unpacked where they are factored.

    Raises:
        StorageError: a file is not as it was written.
    """
    found: dict[str, Tensor] = {}
    for uri, file in job.sums.get(index, ()):
        found |= map_tensors(Directory(uri), file)
    return found


def _bases(names: tuple[str, ...], run: Directory, device: str) -> tuple[Tensor, ...]:
    files = [file for name in names for file in read_record(run, name).files]
    return tuple(map_tensors(run, file)["vectors"].to(device) for file in files)


def _table(
    source: str,
    target: str,
    made: tuple[str, int],
    job: CompressionJob,
    run: Directory,
    how: tuple[str, Callable[[Tensor], Tensor]],
) -> Done:
    device, turn = how
    role, width = made
    checkpoint = Checkpoint.of(job)
    num_rows = job.shape.vocab_size
    digest = hashlib.sha256()
    dtypes = set()

    def blocks() -> Iterator[Tensor]:
        for rows in checkpoint.read_blocks(source, rows=ROWS):
            block = turn(rows.to(device)).cpu()
            require_finite(block)
            digest.update(tensor_bytes(block))
            dtypes.add(NAME_OF[block.dtype])
            yield block

    name = f"model/{weight_files(job.form)[role]}"
    entry = write_rows(run, name, target, blocks(), shape=(num_rows, width))
    facts = {"sha256": digest.hexdigest(), "shape": [num_rows, width], "dtype": dtypes.pop()}
    return (entry,), {"tensors": {target: facts}}
