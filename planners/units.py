"""The units of work of a run, what each depends on, and what determines its bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planners import refit
from planners.plan import SCHEMA_VERSION, ModelForm, Option, Statistic, fingerprint, to_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One piece of work that is done when its record is in the run directory.

    Attributes:
        name: by layer, site or part; never by stage or worker.
        kind: which function does it.
        index: the layer or site; -1 where there is one of the kind.
        inputs: names of the units whose files it reads.
        fingerprint: sha256 of what determines its bytes.
        taps: the statistics that its files must hold; more are welcome, and change none of these.
    """

    name: str
    kind: str
    index: int
    inputs: tuple[str, ...]
    fingerprint: str
    taps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What determines the bytes of every unit of a run.

    Attributes:
        model_revision: content hash of the input checkpoint.
        calibration_hash: sha256 of the calibration tokens.
        microbatch_sequences: sequences a microbatch; products are formed a microbatch at a time.
        compute_dtype: dtype of the calibration forward.
        threads: threads of one unit.
        device: device class, ``cpu`` or the name of the accelerator.
        statistics_dtype: of the grams as they are stored between the pass and the methods.
    """

    model_revision: str
    calibration_hash: str
    microbatch_sequences: int
    compute_dtype: str
    threads: int
    device: str
    statistics_dtype: str = "float64"


def statistics_units(
    identity: Identity, statistics: frozenset[Statistic], num_layers: int
) -> list[Unit]:
    """Return one unit a layer; what a layer's sums are does not depend on any method."""
    common = {"schema": SCHEMA_VERSION, "kind": "statistics", **to_json(identity)}
    units = []
    for layer in range(num_layers):
        taps = tuple(str(s) for s in layer_statistics(statistics, layer, num_layers))
        unit = _unit("statistics", layer, "statistics-layer-{:05d}", (), {**common, "layer": layer})
        units.append(replace(unit, taps=taps))
    return units


def layer_statistics(
    statistics: frozenset[Statistic], layer: int, num_layers: int
) -> list[Statistic]:
    """Return what one layer accumulates; only the last observes what leaves it."""
    last = layer == num_layers - 1
    return sorted(s for s in statistics if s.tap != "resid_out" or s.kind == "cosine" or last)


def compression_units(
    sums: Sequence[Unit],
    *,
    method: str,
    revision: int,
    options: Mapping[str, Option],
    form: ModelForm,
    residual: bool,
) -> list[Unit]:
    """Return the basis, layer, embedding and head units of one method.

    Layers that are to be refitted are drafts: `refit_units` says what comes of them.
    """
    common = {
        "schema": SCHEMA_VERSION,
        "method": method,
        "revision": revision,
        "options": to_json(options),
    }
    num_layers = len(form.layers)
    bases = _basis_units(sums, common, form) if residual else []

    def basis(site: int) -> tuple[Unit, ...]:
        return (bases[site if len(bases) > 1 else 0],) if bases else ()

    units = list(bases)
    refitted = bool(options.get("refit"))
    kind, name = ("draft", "draft-layer-{:05d}") if refitted else ("layer", "layer-{:05d}")
    for layer in range(num_layers):
        inputs = {u.name: u for s in range(2 * layer, 2 * layer + 3) for u in basis(s)}
        parts = tuple(inputs.values()) or (sums[layer],)
        key = {**common, "layer": layer, "form": to_json(form.layers[layer])}
        units.append(_unit(kind, layer, name, parts, key))
    edges = {"embedding": (form.embedding_dim, 0), "head": (form.head_dim, 2 * num_layers)}
    for kind, (dim, site) in edges.items():
        parts = basis(site) or (sums[0],)
        key = {**common, "dim": dim, "tied": form.tied, "native": form.native}
        units.append(_unit(kind, -1, kind, parts, key))
    return units


def damage_units(
    sums: Sequence[Unit], *, method: str, revision: int, options: Mapping[str, Option]
) -> list[Unit]:
    """Return one unit a layer: the damage of every cut of a grid, on the layer's own inputs."""
    key = {
        "schema": SCHEMA_VERSION,
        "method": method,
        "revision": revision,
        "options": to_json({k: v for k, v in options.items() if k not in ("allocation", "refit")}),
    }
    return [_unit("damage", u.index, "damage-layer-{:05d}", (u,), key) for u in sums]


def refit_units(drafts: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Return the chain of the second pass, and one unit a layer that is the result of both.

    The chain embeds the tokens, refits layer by layer, and ends with the losses of the drafts and
    of the refitted layers, of which the layers of the result are the better ones.
    """
    key = {
        "schema": SCHEMA_VERSION,
        "revision": refit.REVISION,
        "held_out": refit.HELD_OUT,
        "dampings": to_json(refit.DAMPINGS),
    }
    # The sums of a draft carry the identity of the tokens, as all that follows from them does.
    chain = [_unit("refit_start", -1, "refit-start", drafts[:1], key)]
    for draft in drafts:
        inputs = (chain[-1], draft)
        chain.append(_unit("refit_layer", draft.index, "refit-layer-{:05d}", inputs, key))
    chain.append(_unit("refit_losses", len(drafts), "refit-losses", chain[-1:], key))
    chosen = [
        _unit("chosen", u.index, "layer-{:05d}", (u, refitted, chain[-1]), key)
        for u, refitted in zip(drafts, chain[1:-1], strict=True)
    ]
    return chain, chosen


def _basis_units(sums: Sequence[Unit], common: Mapping[str, Any], form: ModelForm) -> list[Unit]:
    if common["options"].get("rotation") == "shared":
        key = {**common, "dim": form.embedding_dim}
        return [_unit("basis_shared", -1, "basis-shared", tuple(sums), key)]
    dims = [dim for layer in form.layers for dim in (layer.residual_in, layer.residual_mid)]
    dims.append(form.layers[-1].residual_out)
    if common["options"].get("schedule") == "sequential":
        return _chain(sums[0], common, dims)
    return [
        _unit("basis", s, "basis-site-{:05d}", (sums[min(s // 2, len(sums) - 1)],),
              {**common, "site": s, "dim": dim})
        for s, dim in enumerate(dims)
    ]  # fmt: skip


def _chain(tokens: Unit, common: Mapping[str, Any], dims: Sequence[int]) -> list[Unit]:
    """Return one basis unit a site, each behind all before it; the first reads tokens alone."""
    units: list[Unit] = []
    for site, dim in enumerate(dims):
        # All before it: streams between sites are no unit's files, and may have to be made again.
        key = {**common, "site": site, "dim": dim, "tokens": tokens.fingerprint}
        units.append(_unit("basis_sequential", site, "basis-site-{:05d}", tuple(units), key))
    return units


def _unit(
    kind: str, index: int, pattern: str, inputs: Sequence[Unit], key: Mapping[str, Any]
) -> Unit:
    return Unit(
        name=pattern.format(index),
        kind=kind,
        index=index,
        inputs=tuple(u.name for u in inputs),
        fingerprint=fingerprint({**key, "kind": kind, "inputs": [u.fingerprint for u in inputs]}),
    )
