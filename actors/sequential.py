"""Site after site: each basis is found in the residual stream of what is sliced already.

The basis units of ``schedule=sequential`` form a chain. The residual stream of a site is kept at
full width, in the model's own axes, in files of one microbatch each. A unit reads the stream of the
site before its own, cuts it to the axes that were kept there, and passes it through the half layer
between the two sites in the form in which that half ships, except that it writes full width. What
comes out is the stream of this site: its gram gives the site's axes, its files feed the next unit.

Cutting what an uncut half wrote, ``(x Q_a^T + f(x Q_a)) Q_b``, is what the shipped half computes,
``x Q_a^T Q_b + f(x Q_a) Q_b``, so every token passes every half layer once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from actors import methods
from actors.messages import CompressionJob
from actors.modeling.halves import HalvedLayer
from actors.observe import ADD
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tensors import read_tensors, write_tensors
from actors.storage.tokens import tokens_from_parquet
from planners.families import load as load_family


def site_gram(
    site: int, bases: Sequence[str], *, job: CompressionJob, run: Directory, device: str
) -> Tensor:
    """Return the gram of a site behind the sliced prefix, and leave its stream for the next one.

    Args:
        site: 2 l before the attention of layer l, 2 l + 1 before its MLP, the last after all.
        bases: units of the sites before it, in order.
        job: method, options and shape.
        run: where tokens and bases lie, and streams are kept.
        device: where to compute.
    """
    prefix = _Prefix(bases, job, run, device)
    total = torch.zeros(job.shape.hidden, job.shape.hidden, dtype=torch.float64, device=device)
    add = ADD[methods.load(job.method).site_kind(job.options)]
    # Usually this is one site. After a loss of streams, those that are missing are made again.
    for number in range(prefix.first_missing(site), site + 1):
        prefix.forget(number - 2)
        for hidden in prefix.stream(number):
            if number == site:
                add(hidden, total=total)
    return total


class _Prefix:
    """The sites whose bases are known, and the streams that pass them."""

    def __init__(
        self, bases: Sequence[str], job: CompressionJob, run: Directory, device: str
    ) -> None:
        self._bases, self._job, self._run, self._device = bases, job, run, device
        self._checkpoint = Checkpoint(job.checkpoint_uri)
        self._dtype = getattr(torch, job.stream.dtype)
        ids = torch.from_numpy(tokens_from_parquet(run.read(job.stream.tokens)))
        size = job.stream.microbatch_sequences
        self._microbatches = [ids[start : start + size] for start in range(0, len(ids), size)]

    def first_missing(self, site: int) -> int:
        """Return the first site whose stream must be made before that of ``site``, or ``site``."""
        # The stream of site 0 is the embedding, which is looked up and never kept.
        while site > 1 and not self._is_kept(site - 1):
            site -= 1
        return site

    def stream(self, site: int) -> Iterator[Tensor]:
        """Yield the microbatches of a site's stream, keeping each where a later site reads it."""
        if site == 0:
            yield from self._kept(0)
            return
        name = f"basis/{self._bases[site - 1]}.safetensors"
        basis = read_tensors(self._run, name)["vectors"].to(self._device)
        half = self._half(site, basis)
        for index, full in enumerate(self._kept(site - 1)):
            cut = full @ basis.to(full.dtype)  # (sequences, tokens, keep)
            hidden = _through_half(half, cut, site)
            if site < self._job.shape.num_sites - 1:
                write_tensors(self._run, _name(site, index), {"hidden": hidden})
            yield hidden

    def forget(self, site: int) -> None:
        """Delete a stream that was read to its end."""
        for index in range(len(self._microbatches) if site > 0 else 0):
            self._run.delete(_name(site, index))

    def _half(self, site: int, basis: Tensor) -> HalvedLayer:
        """Return the layer that leads to a site, cut where that half reads and nowhere else."""
        shape = self._job.shape
        layer, is_mlp = divmod(site - 1, 2)
        full = torch.eye(shape.hidden, dtype=basis.dtype, device=basis.device)
        bases = (full, basis, full) if is_mlp else (basis, full, full)
        form = replace(
            self._job.form.layers[layer],
            residual_in=bases[0].shape[1],
            residual_mid=bases[1].shape[1],
            residual_out=shape.hidden,
        )
        dense = {k: v.to(self._device) for k, v in self._checkpoint.read_layer(layer).items()}
        weights = methods.load(self._job.method).apply(dense, bases, form=form)
        family = load_family(shape.family)
        return HalvedLayer(
            {family.below_layer(role): tensor for role, tensor in weights.items()},
            form,
            self._checkpoint.config,
            shape=shape,
            dtype=self._dtype,
            device=self._device,
        )

    def _kept(self, site: int) -> Iterator[Tensor]:
        if site == 0:
            yield from self._embedded()
            return
        for index in range(len(self._microbatches)):
            yield read_tensors(self._run, _name(site, index))["hidden"].to(self._device)

    def _embedded(self) -> Iterator[Tensor]:
        name = load_family(self._job.shape.family).embedding
        table = self._checkpoint.read(name).to(self._device, self._dtype)
        for ids in self._microbatches:
            yield torch.nn.functional.embedding(ids.to(self._device), table)

    def _is_kept(self, site: int) -> bool:
        names = (_name(site, index) for index in range(len(self._microbatches)))
        return all(self._run.size(name) is not None for name in names)


def _through_half(half: HalvedLayer, cut: Tensor, site: int) -> Tensor:
    """Return the stream of a site from the cut stream of the site before it."""
    return half.after_attention(cut) if site % 2 else half.after_mlp(cut)


def _name(site: int, index: int) -> str:
    return f"boundary/sequential-site-{site:05d}-mb-{index:05d}.safetensors"
