"""Sequential slicing: the basis of a site is found after all layers before it have been sliced.

With ``schedule=sequential`` the residual stream of a site is kept at full width, in the model's own
axes, in files of one microbatch each. The tokens are cut into shards. A stream unit reads its shard
at the site before, cuts it to the axes that were kept there, and passes it through the half layer
between the two sites as that half is in the result, except that it writes full width. What comes
out is the shard's stream of this site: its gram is added to those of the other shards, in
their order, and gives the site's axes; its files feed the same shard at the next site. So shards
pass a site side by side, and layers whose three bases are known are compressed meanwhile; a site
cannot begin before the axes of the one before are known, which need all tokens.

Cutting what an uncut half wrote, ``(x Q_a^T + f(x Q_a)) Q_b``, is what the result's half computes,
``x Q_a^T Q_b + f(x Q_a) Q_b``, so every token passes every half layer once.
"""

from dataclasses import replace

import torch
from torch import Tensor

from actors import methods
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob, Done, UnitTask
from actors.modeling.halves import HalvedLayer
from actors.modeling.outer_model import OuterModel
from actors.statistics.kinds import FUNCTIONS
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory, FileEntry
from actors.storage.records import read_record
from actors.storage.tensors import map_tensors, read_tensors, write_tensors
from actors.storage.tokens import tokens_from_parquet
from planners.calibration import shard_cuts
from planners.families import load as load_family


def stream(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Pass one shard from the site before to a site; write its stream and its gram there."""
    device = reads.device
    cuts = _shards(job)
    site, shard = divmod(task.index, len(cuts))
    files: list[FileEntry] = []
    dim = job.shape.hidden
    total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    add = FUNCTIONS[methods.load(job.method).site_kind(job.options)].add
    assert add is not None  # a site is a tap
    at_site = _SiteStream(site, task.inputs[0] if site else "", job, run, device)
    for index in range(*cuts[shard]):
        hidden = at_site.microbatch(index)
        add(hidden, total=total)
        if 0 < site < job.shape.num_sites - 1:  # embeddings are looked up again
            files.append(write_tensors(run, _stream_name(site, index), {"hidden": hidden}))
    files.append(write_tensors(run, _gram_name(site, shard), {"gram": total.cpu()}))
    return tuple(files), {}


def site_gram(site: int, *, job: CompressionJob, run: Directory, device: str) -> Tensor:
    """Return the gram of a site after the sliced layers: those of its shards, summed in order."""
    dim = job.shape.hidden
    total = torch.zeros(dim, dim, dtype=torch.float64, device=device)
    for shard in range(len(_shards(job))):
        total += read_tensors(run, _gram_name(site, shard))["gram"].to(device)
    return total


class _SiteStream:
    """The residual stream of a site, computed from that of the site before."""

    def __init__(
        self, site: int, basis: str, job: CompressionJob, run: Directory, device: str
    ) -> None:
        self._site, self._job, self._run, self._device = site, job, run, device
        self._checkpoint = Checkpoint.of(job)
        self._dtype = getattr(torch, job.batching.dtype)
        if site <= 1:
            family = load_family(job.shape.family)
            config = self._checkpoint.config
            self._outer = OuterModel(config, family, dtype=self._dtype, device=device)
            self._outer.read_embedding(self._checkpoint)
            self._ids = torch.from_numpy(tokens_from_parquet(run.read(job.tokens)))
        if site > 0:
            (file,) = read_record(run, basis).files
            found = map_tensors(run, file)["vectors"].to(device)
            self._half = self._half_layer(found)
            self._basis = found.to(self._dtype)

    def microbatch(self, index: int) -> Tensor:
        """Return the stream of this site, (sequences, tokens, hidden)."""
        if self._site == 0:
            return self._embedded(index)
        if self._site == 1:
            full = self._embedded(index)
        else:
            name = _stream_name(self._site - 1, index)
            full = read_tensors(self._run, name)["hidden"].to(self._device)
        return _through_half(self._half, full @ self._basis, self._site)

    def _embedded(self, index: int) -> Tensor:
        size = self._job.batching.microbatch_sequences
        return self._outer.embed(self._ids[index * size : (index + 1) * size])

    def _half_layer(self, basis: Tensor) -> HalvedLayer:
        """Return the layer that leads to this site, cut where that half reads and nowhere else."""
        shape = self._job.shape
        layer, is_mlp = divmod(self._site - 1, 2)
        full = torch.eye(shape.hidden, dtype=basis.dtype, device=basis.device)
        bases = (full, basis, full) if is_mlp else (basis, full, full)
        form = replace(
            self._job.form.layers[layer],
            residual_in=bases[0].shape[1],
            residual_mid=bases[1].shape[1],
            residual_out=shape.hidden,
        )
        dense = {k: v.to(self._device) for k, v in self._checkpoint.read_layer(layer).items()}
        weights = methods.load(self._job.method).apply(dense, bases, shape=shape, form=form)
        family = load_family(shape.family)
        return HalvedLayer(
            {family.below_layer(role): tensor for role, tensor in weights.items()},
            form,
            self._checkpoint.config,
            index=layer,
            shape=shape,
            dtype=self._dtype,
            device=self._device,
        )


def _through_half(half: HalvedLayer, cut: Tensor, site: int) -> Tensor:
    """Return the stream of a site from the cut stream of the site before it."""
    return half.residual_mid(cut) if site % 2 else half.after_mlp(cut)


def _shards(job: CompressionJob) -> list[tuple[int, int]]:
    return shard_cuts(int(job.options["shards"]), job.batching.num_microbatches)


def _stream_name(site: int, index: int) -> str:
    return f"boundary/sequential-site-{site:05d}-mb-{index:05d}.safetensors"


def _gram_name(site: int, shard: int) -> str:
    return f"boundary/sequential-gram-{site:05d}-shard-{shard:05d}.safetensors"
