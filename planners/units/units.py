"""The units of work of a run, their inputs, and what determines their bytes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from planners import recovery, refit
from planners.batching import TokenBatching
from planners.calibration import shard_cuts
from planners.canonical_json import SCHEMA_VERSION, fingerprint, to_json
from planners.method import MethodSpec, Option
from planners.model.form import ModelForm, factor_owners, site_dims
from planners.model.serving_load import ServingLoad
from planners.model.shape import ModelShape
from planners.model.taps import Statistic, layer_statistics
from planners.recovery import Recovery
from planners.units.kinds import KINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One piece of work that is done when its record is in the run directory.

    Attributes:
        name: by layer, site or part; never by stage or worker.
        kind: see `planners.units.kinds`.
        index: the layer or site; -1 if there is only one unit of the kind.
        inputs: names of the units whose files it reads.
        fingerprint: sha256 of what determines its bytes.
        taps: the statistics that its files must hold; files may hold others too.
        lasting: its record is kept; else record and files are removed once all units that read
            them are done.
        suffix: of its file's name, if the file is added to existing ones.
    """

    name: str
    kind: str
    index: int
    inputs: tuple[str, ...]
    fingerprint: str
    taps: tuple[str, ...] = ()
    lasting: bool = True
    suffix: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What determines the bytes of every unit of a run.

    Attributes:
        model_revision: content hash of the input checkpoint.
        calibration_hash: sha256 of the calibration tokens.
        batching: of the calibration tokens.
        threads: threads of one unit.
        device: device class, ``cpu`` or the name of the accelerator.
        statistics_dtype: of the grams as they are stored between the pass and the methods.
    """

    model_revision: str
    calibration_hash: str
    batching: TokenBatching
    threads: int
    device: str
    statistics_dtype: str = "float64"

    def key(self) -> dict[str, Any]:
        """Return the content of fingerprints; renaming a key would invalidate every record.

        The number of tokens is covered by their hash.
        """
        return {
            "model_revision": self.model_revision,
            "calibration_hash": self.calibration_hash,
            "microbatch_sequences": self.batching.microbatch_sequences,
            "compute_dtype": self.batching.dtype,
            "threads": self.threads,
            "device": self.device,
            "statistics_dtype": self.statistics_dtype,
            "shards": self.batching.shards,
        }


def statistics_units(
    identity: Identity, statistics: frozenset[Statistic], shape: ModelShape
) -> list[Unit]:
    """Return one unit a layer; the sums of a layer do not depend on the method."""
    common = {"schema": SCHEMA_VERSION, "kind": "statistics", **identity.key()}
    units = []
    for layer in range(shape.num_layers):
        taps = tuple(str(s) for s in layer_statistics(shape, statistics, layer))
        unit = _unit("statistics", layer, (), {**common, "layer": layer})
        units.append(replace(unit, taps=taps))
    return units


def carried_units(
    identity: Identity,
    statistics: frozenset[Statistic],
    sums: Sequence[Unit],
    layers: Sequence[Unit],
    shape: ModelShape,
) -> list[Unit]:
    """Return one unit a layer that rotates the statistics from before a step to after it.

    Args:
        identity: of the output model of the step.
        statistics: what is carried over.
        sums: statistics units of the step.
        layers: its layer units; their inputs are the bases.
        shape: of the model.
    """
    common = {"schema": SCHEMA_VERSION, **identity.key()}
    units = []
    for total, layer in zip(sums, layers, strict=True):
        taps = tuple(str(s) for s in layer_statistics(shape, statistics, layer.index))
        unit = _unit("carried", layer.index, (total, layer), common)
        units.append(replace(unit, inputs=(total.name, *layer.inputs), taps=taps))
    return units


def needed(units: Sequence[Unit], *, done: Callable[[Unit], bool]) -> list[Unit]:
    """Return the units to do: lasting ones without a record, and the inputs that they need.

    Args:
        units: each after its inputs.
        done: whether a unit has its record and its files.
    """
    found: list[Unit] = []
    wanted: set[str] = set()
    for unit in reversed(units):
        if (unit.lasting or unit.name in wanted) and not done(unit):
            found.insert(0, unit)
            wanted.update(unit.inputs)
    return found


def spent(unit: Unit, units: Sequence[Unit], *, done: Callable[[Unit], bool]) -> list[Unit]:
    """Return the temporary inputs of a unit that no unit needs any more."""
    return [
        other
        for other in units
        if other.name in unit.inputs
        and not other.lasting
        and all(done(reader) for reader in units if other.name in reader.inputs)
    ]


def compression_units(
    sums: Sequence[Unit],
    *,
    spec: MethodSpec,
    options: Mapping[str, Option],
    form: ModelForm,
    num_microbatches: int,
    makers: Sequence[Mapping[str, str]] = (),
) -> list[Unit]:
    """Return the stream, basis, layer, embedding and head units of one method.

    Layers that will be refitted are drafts, from which `refit_units` continues.

    Args:
        sums: the statistics units.
        spec: of the method.
        options: of the method, complete.
        form: widths of the result.
        num_microbatches: of the calibration tokens, for units that stream them.
        makers: of each layer, module -> the method that shrinks it, where several compete.
    """
    common: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "method": spec.name,
        "revision": spec.revision,
        "options": to_json(options),
    }
    num_layers = len(form.layers)
    units = _basis_units(sums, common, form, num_microbatches) if spec.residual else []
    bases = {unit.index: unit for unit in units if unit.lasting}

    def basis(site: int) -> tuple[Unit, ...]:
        found = bases.get(site, bases.get(-1))  # a shared basis has no site
        return (found,) if found is not None else ()

    cast = {"dtype": form.dtype} if form.dtype else {}
    refitted = bool(options.get("refit"))
    kind = "draft" if refitted else "layer"
    made: list[Unit] = []
    for layer in range(num_layers):
        inputs = {u.name: u for s in range(2 * layer, 2 * layer + 3) for u in basis(s)}
        shared = _shared_units(layer, form, sums, made)
        parts = tuple(inputs.values()) or (sums[layer], *shared)
        key = {**common, **cast, "layer": layer, "form": to_json(form.layers[layer])}
        if makers:
            key["makers"] = dict(makers[layer])
            key["revisions"] = {c.spec.name: c.spec.revision for c in spec.candidates}
        made.append(_unit(kind, layer, parts, key))
    units += made
    last = basis(2 * num_layers)
    ends = basis(0) + last if form.head_shortcut else last
    edges = {"embedding": (form.embedding_dim, basis(0)), "head": (form.head_dim, ends)}
    for kind, (dim, read) in edges.items():
        parts = read or (sums[0],)
        key = {**common, **cast, "dim": dim, "tied": form.tied, "native": form.native}
        if kind in form.tables:
            key["scheme"] = to_json(form.tables[kind])
        units.append(_unit(kind, -1, parts, key))
    return units


def _shared_units(
    layer: int, form: ModelForm, sums: Sequence[Unit], made: Sequence[Unit]
) -> list[Unit]:
    """Return what a layer needs of others: the factors that it takes, or the sums of its takers.

    A source is a layer that stays as it is in the input model, so nothing has to be waited for.
    """
    factors = factor_owners(form)
    owners = sorted({owner for taker, owner in factors if taker == layer})
    takers = sorted({taker for taker, owner in factors if owner == layer})
    return [made[owner] for owner in owners] + [sums[taker] for taker in takers]


# Options that do not affect damage: the cuts of a method are the same whoever competes with it.
OF_NO_DAMAGE = ("allocation", "refit", "candidates")


def damage_units(
    sums: Sequence[Unit],
    *,
    method: str,
    revision: int,
    options: Mapping[str, Option],
    by: str = "",
) -> list[Unit]:
    """Return one unit a layer: the damage of every cut of a grid, on the layer's dense inputs.

    If several methods compete, ``by`` names the one whose cuts are measured.
    """
    key = {
        "schema": SCHEMA_VERSION,
        "method": method,
        "revision": revision,
        "options": to_json({k: v for k, v in options.items() if k not in OF_NO_DAMAGE}),
    }
    return [_unit("damage", u.index, (u,), key, by=by) for u in sums]


def times_unit(
    identity: Identity, load: ServingLoad, *, method: str, options: Mapping[str, Option]
) -> Unit:
    """Return the unit that measures how long layers of each width take under a load."""
    known = {"device": identity.device, "threads": identity.threads}
    key = {
        "schema": SCHEMA_VERSION,
        "model_revision": identity.model_revision,
        **known,
        "load": to_json(load),
        "method": method,
        "options": to_json(options),
    }
    return _unit("times", -1, (), key)


def losses_units(
    sums: Sequence[Unit],
    *,
    method: str,
    revision: int,
    modules: Sequence[str],
    form: ModelForm,
) -> list[Unit]:
    """Return one unit a layer: the loss of truncating these linears to the ranks of a form."""
    key = {
        "schema": SCHEMA_VERSION,
        "method": method,
        "revision": revision,
        "modules": list(modules),
    }
    return [
        _unit("losses", u.index, (u,),
              {**key, "ranks": to_json(form.layers[u.index].ranks)})
        for u in sums
    ]  # fmt: skip


def refit_units(drafts: Sequence[Unit]) -> tuple[list[Unit], list[Unit]]:
    """Return the chain of the second pass, and one unit a layer that copies the better version.

    The chain embeds the tokens, refits layer by layer, and ends with the losses of the drafts and
    of the refitted layers; the result has the version with the smaller loss.
    """
    key = {
        "schema": SCHEMA_VERSION,
        "revision": refit.REVISION,
        "held_out": refit.HELD_OUT,
        "dampings": to_json(refit.RIDGES),
    }
    # The fingerprint of a draft includes that of its sums, and so the identity of the tokens.
    chain = [_unit("refit_start", -1, drafts[:1], key)]
    for draft in drafts:
        chain.append(_unit("refit_layer", draft.index, (chain[-1], draft), key))
    chain.append(_unit("refit_losses", len(drafts), chain[-1:], key))
    chosen = [
        _unit("chosen", u.index, (u, refitted, chain[-1]), key)
        for u, refitted in zip(drafts, chain[1:-1], strict=True)
    ]
    return chain, chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryUnits:
    """The units that recover a compressed model.

    Attributes:
        inputs: of the layers of the dense model, chains of activations; of ``local`` alone.
        training: of the whole model by a group of workers; of ``global`` alone.
        trained: the files of the recovered model: layers, embedding, head.
        choice: whether that one is the result, or the model before it.
        kept: the files of the result, copies of the better ones.
    """

    inputs: tuple[Unit, ...]
    training: Unit | None
    trained: tuple[Unit, ...]
    choice: Unit
    kept: tuple[Unit, ...]

    @property
    def by_layer(self) -> tuple[Unit, ...]:
        """The activations and the files of the trained model, layer by layer."""
        found, left = list(self.inputs[: recovery.SHARDS]), list(self.inputs[recovery.SHARDS :])
        for unit in self.trained:
            found += [*left[: recovery.SHARDS], unit]
            del left[: recovery.SHARDS]
        return tuple(found)

    @property
    def all(self) -> tuple[Unit, ...]:
        """All of them, each after its inputs."""
        group = () if self.training is None else (self.training,)
        return (*group, *self.by_layer, self.choice, *self.kept)


def recovery_units(
    cut: Sequence[Unit],
    how: Recovery,
    *,
    tokens_hash: str,
    teacher: str,
    identity: Identity,
) -> RecoveryUnits:
    """Return the units that train a compressed model and keep the better of the two.

    Args:
        cut: the units that wrote its layers, embedding and head.
        how: it is trained.
        tokens_hash: of the tokens, those that are held out at the end.
        teacher: content hash of the model whose logits are learnt.
        identity: of the run; the tokens of the calibration do not matter.
    """
    key: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "revision": recovery.REVISION,
        "recovery": to_json(how),
        "tokens": tokens_hash,
        "model_revision": identity.model_revision,
        "teacher": teacher,
        "dtype": identity.batching.dtype,
        "threads": identity.threads,
        "device": identity.device,
    }
    layers = [unit for unit in cut if KINDS[unit.kind].of == "layer"]
    tables = [unit for unit in cut if unit not in layers]
    inputs: list[Unit] = []
    training: Unit | None = None
    if how.mode == "local":
        inputs = _inputs_units(len(layers), key)
        trained = [
            _unit("recover_layer", u.index, (u, *_around(inputs, u.index)), key) for u in layers
        ]
        trained = [
            replace(unit, inputs=(*unit.inputs, *layer.inputs))
            for unit, layer in zip(trained, layers, strict=True)
        ]
        trained += [_unit(f"export_{u.kind}", -1, (u,), key) for u in tables]
    else:
        training = _unit("recover_model", -1, cut, key)
        trained = [
            _unit(
                "export_layer" if u in layers else f"export_{u.kind}", u.index, (u, training), key
            )
            for u in (*layers, *tables)
        ]
    choice = _unit("recover_choice", -1, (*cut, *trained), key)
    kept = [
        _unit("kept_layer" if u in layers else f"kept_{u.kind}", u.index, (u, new, choice), key)
        for u, new in zip((*layers, *tables), trained, strict=True)
    ]
    return RecoveryUnits(
        inputs=tuple(inputs),
        training=training,
        trained=tuple(trained),
        choice=choice,
        kept=tuple(kept),
    )


def _inputs_units(num_layers: int, key: Mapping[str, Any]) -> list[Unit]:
    """Return the activations before each layer, and behind the last, in shards of the tokens."""
    units: list[Unit] = []
    for layer in range(num_layers + 1):
        before = units[-recovery.SHARDS :]
        for shard in range(recovery.SHARDS):
            own = {**key, "shard": shard, "of": layer}
            index = layer * recovery.SHARDS + shard
            unit = _unit("inputs", index, before[shard : shard + 1], own)
            name = f"inputs-layer-{layer:05d}-shard-{shard:05d}"
            units.append(replace(unit, name=name, lasting=False))
    return units


def _around(inputs: Sequence[Unit], layer: int) -> Sequence[Unit]:
    """Return the activations before and behind a layer."""
    return inputs[layer * recovery.SHARDS : (layer + 2) * recovery.SHARDS]


def _basis_units(
    sums: Sequence[Unit], common: Mapping[str, Any], form: ModelForm, num_microbatches: int
) -> list[Unit]:
    if common["options"].get("rotation") == "shared":
        key = {**common, "dim": form.embedding_dim}
        return [_unit("basis_shared", -1, tuple(sums), key)]
    dims = site_dims(form)
    if common["options"].get("schedule") == "sequential":
        shards = len(shard_cuts(int(common["options"]["shards"]), num_microbatches))
        return _chain(sums[0], common, list(dims.values()), shards)
    return [
        _unit("basis", s, (sums[min(s // 2, len(sums) - 1)],),
              {**common, "site": s, "dim": dim})
        for s, dim in dims.items()
    ]  # fmt: skip


def _chain(
    tokens: Unit, common: Mapping[str, Any], dims: Sequence[int], num_shards: int
) -> list[Unit]:
    """Return the stream units of each site, one per shard, each followed by the site's basis.

    A shard of a site needs the basis of the site before and its own shard there; the first site
    reads only tokens.
    """
    units: list[Unit] = []
    before: list[Unit] = []  # the basis of the site before, and its streams
    for site, dim in enumerate(dims):
        here: list[Unit] = []
        for shard in range(num_shards):
            inputs = (before[0], before[1 + shard]) if before else ()
            key = {**common, "site": site, "shard": [shard, num_shards]}
            key["tokens"] = tokens.fingerprint
            unit = _unit("stream", site * num_shards + shard, inputs, key)
            name = f"stream-site-{site:05d}-shard-{shard:05d}"
            here.append(replace(unit, name=name, lasting=False))
        key = {**common, "site": site, "dim": dim}
        basis = _unit("basis_sequential", site, here, key)
        units += [*here, basis]
        before = [basis, *here]
    return units


def _unit(
    kind: str, index: int, inputs: Sequence[Unit], key: Mapping[str, Any], *, by: str = ""
) -> Unit:
    return Unit(
        name=KINDS[kind].unit(index, by=by),
        kind=kind,
        index=index,
        inputs=tuple(u.name for u in inputs),
        fingerprint=fingerprint({**key, "kind": kind, "inputs": [u.fingerprint for u in inputs]}),
    )
