"""The door: everything that can be wrong is found here, before a worker or a device is held."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from actors import methods
from actors.storage import door
from actors.storage.checkpoint import Checkpoint
from actors.storage.contents import revision_of, tokenizer_hash
from actors.storage.files import Directory
from actors.storage.sources import resolve_model, resolve_store
from actors.storage.tokens import prepare_tokens, tokens_hash
from orchestrator.chain import StepInput, chained, planned
from orchestrator.config import (
    DEFAULT_SEQUENCE_LENGTH,
    Facts,
    RunConfig,
    check_length,
    resolved,
    with_tokens,
)
from orchestrator.method_options import chosen_methods, resolve_layer_options, resolve_steps
from orchestrator.subjects import EvaluationPlan, Subject, exact_dtype
from planners.compose import require_disjoint
from planners.cost import dense_start
from planners.errors import ClusterError, ModelError
from planners.families.llama import DEFAULTS, windows
from planners.placement import load_of, place
from planners.plan import SCHEMA_VERSION, MethodSpec, Option, RunPlan, Start, Statistic
from planners.planning import Workload
from planners.units import Identity

GIB = 2**30
WINDOW = "sliding_window"
USABLE_DEVICE = 0.9  # of a device's memory: the rest is its context and the allocator's
USABLE = 0.8  # share of a machine's memory that its workers may plan with


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A run that is ready to start.

    Attributes:
        config: the recipe with nothing left open.
        given: the recipe as it was asked for.
        model_uri: the input checkpoint.
        model_config: its ``config.json``.
        revision: content hash of it; empty where a large model was only planned for.
        contents: what that is the hash of (`actors.storage.contents`).
        tokenizer_hash: of the files that the result takes over, generation_config.json among them.
        spec: of the method.
        options: of the method, complete.
        plan: what will be done.
        identity: what determines the bytes.
        calibration: token ids, (sequences, tokens), int64.
        evaluation: token ids, (sequences, tokens), int64.
        evaluation_hash: sha256 of the latter.
        source_bytes: bytes of the input's tensors.
        statistics_uri: another run whose statistics are reused, or empty.
        extra_statistics: summed too, because others will want them.
        start: widths of the input model, and what budgets are fractions of.
        work: how much data passes the model.
        former: the steps before this one, where several methods are applied in turn. What only
            their work will tell, such as the content hash of this one's input, is not known yet.
        carries: the next step's statistics follow from this one's, and are not measured again.
        expected: what the run was to take, for the report to compare.
        layer_options: layer -> options of the method for that layer alone.
    """

    config: RunConfig
    given: RunConfig
    model_uri: str
    model_config: Mapping[str, Any]
    revision: str
    contents: Mapping[str, str]
    tokenizer_hash: str
    spec: MethodSpec
    options: Mapping[str, Option]
    plan: RunPlan
    identity: Identity
    calibration: np.ndarray
    evaluation: np.ndarray
    evaluation_hash: str
    source_bytes: int
    start: Start
    work: Workload
    statistics_uri: str = ""
    extra_statistics: frozenset[Statistic] = frozenset()
    former: tuple["Prepared", ...] = ()
    carries: bool = False
    expected: Mapping[str, Any] = field(default_factory=dict)
    layer_options: Mapping[int, Mapping[str, Option]] = field(default_factory=dict)

    @property
    def run(self) -> Directory:
        """The run directory."""
        return Directory(self.config.out)

    @property
    def statistics(self) -> frozenset[Statistic]:
        """What the calibration pass sums."""
        return self.spec.statistics(self.options) | self.extra_statistics

    @property
    def title(self) -> str:
        """Model, methods and targets in a line."""
        said = [self.config.model]
        for step in (*self.former, self):
            target = step.config.target
            size = f"slice {target.slice}" if target.slice is not None else ""
            said += [step.spec.name, size or f"keep {target.keep_fraction}"]
        return " · ".join(said)

    @property
    def origin(self) -> "Prepared":
        """The first step, whose input is the model that the run began with."""
        return self.former[0] if self.former else self

    def asked(self) -> dict[str, Any]:
        """Return the method of this step and how small its result is to be."""
        target = self.config.target
        sizes = {"keep_fraction": target.keep_fraction, "slice": target.slice}
        return {"method": self.spec.name, **{k: v for k, v in sizes.items() if v is not None}}

    def facts(self) -> dict[str, Any]:
        """Return what makes this run this run: another value of any is another run."""
        target = self.config.target
        steps = {
            "steps": [
                {
                    **step.asked(),
                    "method revision": step.spec.revision,
                    "options": dict(step.options),
                    **({"candidate revisions": found} if (found := revisions(step.spec)) else {}),
                }
                for step in (*self.former, self)
            ]
        }
        only = {
            "method": self.spec.name,
            "method revision": self.spec.revision,
            "options": dict(self.options),
            # None, not empty: runs from before there were any have none either.
            "layer options": {str(k): dict(v) for k, v in self.layer_options.items()} or None,
            "candidate revisions": revisions(self.spec) or None,
            "keep_fraction": target.keep_fraction,
            "slice": target.slice,
        }
        return {
            "schema": SCHEMA_VERSION,
            "model revision": self.origin.revision or None,
            "tokenizer files": self.tokenizer_hash,
            "calibration data": self.identity.calibration_hash,
            "evaluation data": self.evaluation_hash,
            **(steps if self.former else only),
            "microbatch sequences": self.identity.microbatch_sequences,
            "shards": self.identity.shards,
            "calibration_dtype": self.identity.compute_dtype,
            "statistics_dtype": self.identity.statistics_dtype,
            "threads": self.identity.threads,
            "device": self.identity.device,
        }


def prepare(given: RunConfig, *, only_plan: bool = False) -> Prepared:
    """Return a run whose model, data, method and plan have been checked.

    All of the model is read, for what it is and whether its values are finite.

    Args:
        given: the recipe.
        only_plan: nothing will be done: leave the weights of 1 GB and more unread, unless they are
            to be compared with those that statistics are of. The run has no revision then.

    Raises:
        ConfigError: an option is wrong, or the target is out of reach.
        ModelError: the model is missing, broken or not supported.
        DataError: there is too little text, or it cannot be read.
        StorageError: the run directory is none that can be named.
        ClusterError: ``device`` is auto, and the cluster that says what that is cannot be asked.
    """
    named = [methods.spec(step.method) for step in given.chain]
    options = resolve_steps(given, named)
    specs = chosen_methods(given, options)
    require_disjoint(list(zip(specs, options, strict=True)))
    if given.out:
        Directory(given.out)  # before it is shown to anybody
    source = resolve_model(given.model, copy=given.address == "local")
    store = resolve_store(given.model_store)
    checkpoint = Checkpoint(source.uri, model_store=store)
    shape = checkpoint.shape
    door.check(checkpoint)
    unread = only_plan and not given.stats and not checkpoint.is_small
    contents = {} if unread else checkpoint.contents
    revision = revision_of(contents) if contents else ""
    device = chosen_device(given.device, given.address)
    facts = Facts(
        model_name=source.name,
        longest=longest_sequence(checkpoint.config)[0],
        longest_key=longest_sequence(checkpoint.config)[1],
        options=options,
        device=device,
        calibration_dtype=exact_dtype(device, shape.dtype),  # type: ignore[arg-type] # checked at the door
        worker_gib=round(usable_gib(device, given.workers), 1),
    )
    layer_options = resolve_layer_options(specs[0], given.layer_options)
    config = resolved(given, facts).model_copy(
        update={"layer_options": layer_options, "model_store": store}
    )
    calibration, evaluation = _tokens(config, source.uri, shape.vocab_size)
    config = with_tokens(config, facts, calibration=calibration.shape, evaluation=evaluation.shape)
    sequences, length = calibration.shape
    size = min(sequences, max(1, config.calibration.microbatch_tokens // length))
    shards = min(config.calibration.shards, -(-sequences // size))
    work = Workload(
        sequences=sequences,
        sequence_length=length,
        microbatch_sequences=size,
        shards=shards,
        compute_dtype=config.calibration_dtype,
        evaluation_dtype=exact_dtype(device, shape.dtype),
        statistics_dtype=config.statistics_dtype,
        num_workers=config.workers,
        worker_bytes=int((config.worker_gib or 0) * GIB),
        mapped=sums_are_mapped(config),
    )
    start = dense_start(shape)
    steps = list(zip(specs, options, strict=True))
    dense = StepInput(config=checkpoint.config, shape=shape, start=start)
    path = "steps[0]" if config.steps else ""
    first = Prepared(
        config=config,
        given=given,
        model_uri=source.uri,
        model_config=checkpoint.config,
        revision=revision,
        contents=contents,
        tokenizer_hash=tokenizer_hash(checkpoint.directory),
        spec=specs[0],
        options=options[0],
        plan=planned(steps[0], config.chain[0].target, dense, work, path=path),
        identity=Identity(
            model_revision=revision,
            calibration_hash=tokens_hash(calibration),
            microbatch_sequences=size,
            compute_dtype=config.calibration_dtype,
            threads=config.threads,
            device=config.device,
            statistics_dtype=config.statistics_dtype,
            shards=shards,
        ),
        calibration=calibration,
        evaluation=evaluation,
        evaluation_hash=tokens_hash(evaluation),
        source_bytes=checkpoint.total_bytes,
        statistics_uri=config.stats,
        start=start,
        work=work,
        layer_options=layer_options,
    )
    return chained(first, steps, checkpoint)


def revisions(spec: MethodSpec) -> dict[str, int]:
    """Return the revision of each method that competes; nothing where a method is alone."""
    return {each.spec.name: each.spec.revision for each in spec.candidates}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedEvaluation:
    """One checkpoint, dense or compressed, ready to be evaluated.

    Attributes:
        subject: the checkpoint.
        plan: stages and parts.
        ids: evaluation tokens, (sequences, tokens), int64.
        source: where they are from.
    """

    subject: Subject
    plan: EvaluationPlan
    ids: np.ndarray
    source: str


def prepare_evaluation(given: RunConfig) -> PreparedEvaluation:
    """Return an evaluation of the checkpoint that a recipe names as its model.

    Raises:
        ModelError: the checkpoint is missing, broken or not supported.
        DataError: there is too little text, or it cannot be read.
        ClusterError: ``device`` is auto, and the cluster that says what that is cannot be asked.
    """
    source = resolve_model(given.model, copy=given.address == "local")
    store = resolve_store(given.model_store)
    checkpoint = Checkpoint(source.uri, model_store=store)
    shape = checkpoint.shape
    door.check_classes(checkpoint)
    device = chosen_device(given.device, given.address)
    own = "embedded" if given.model == "tiny" else "stdlib"
    text = given.evaluation.source or own
    held = text == "embedded" or text.startswith("tokens:")
    longest, longest_key = longest_sequence(checkpoint.config)
    ids = prepare_tokens(
        text,
        split="evaluation",
        tokenizer_uri=source.uri,
        vocab_size=shape.vocab_size,
        sequence_length=given.calibration.sequence_length
        or (None if held else min(longest, DEFAULT_SEQUENCE_LENGTH)),
        num_sequences=given.evaluation.sequences,
        bos=given.calibration.bos,
        seed=given.seed,
    )
    if longest_key == WINDOW:  # layers attend to all before; further than trained is only worse
        check_length(ids.shape[1], longest, longest_key, where="evaluation: has sequences of")
    size = min(len(ids), max(1, given.calibration.microbatch_tokens // ids.shape[1]))
    dtype = exact_dtype(device, shape.dtype)
    worker_gib = given.worker_gib or usable_gib(device, given.workers)
    load = load_of(
        shape,
        frozenset(),
        microbatch_tokens=size * ids.shape[1],
        sequence_length=ids.shape[1],
        compute_dtype=dtype,
        start=checkpoint.form,
    )
    return PreparedEvaluation(
        # Its record is kept nowhere, so it needs no identity, and the weights no reading for one.
        subject=Subject(name="model", uri=source.uri, identity="", model_store=store),
        plan=EvaluationPlan(
            family=shape.family,
            waves=place(shape, load, num_workers=given.workers, worker_bytes=int(worker_gib * GIB)),
            num_sequences=len(ids),
            microbatch_sequences=size,
            tokens_hash=tokens_hash(ids),
            dtype=dtype,
            threads=given.threads,
            device=device,
        ),
        ids=ids,
        source=text,
    )


def _tokens(
    config: RunConfig, tokenizer_uri: str, vocab_size: int
) -> tuple[np.ndarray, np.ndarray]:
    calibration = prepare_tokens(
        config.calibration.source,
        split="calibration",
        tokenizer_uri=tokenizer_uri,
        vocab_size=vocab_size,
        sequence_length=config.calibration.sequence_length,
        num_sequences=config.calibration.sequences,
        bos=config.calibration.bos,
        seed=config.seed,
    )
    evaluation = prepare_tokens(
        config.evaluation.source,
        split="evaluation",
        tokenizer_uri=tokenizer_uri,
        vocab_size=vocab_size,
        sequence_length=calibration.shape[1],
        num_sequences=config.evaluation.sequences,
        bos=config.calibration.bos,
        seed=config.seed,
    )
    return calibration, evaluation


def longest_sequence(config: Mapping[str, Any]) -> tuple[int, str]:
    """Return the longest sequence that plain causal attention is right for, and what says so."""
    original = {**config, "model_type": config.get("compressed_from", config["model_type"])}
    longest = {**DEFAULTS[original["model_type"]], **original}["max_position_embeddings"]
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 2:  # noqa: PLR2004
        raise ModelError(f"config.json: max_position_embeddings is {longest!r}; it must be above 1")
    window = min((window for window in windows(original) if window is not None), default=longest)
    return (window, WINDOW) if window < longest else (longest, "max_position_embeddings")


def sums_are_mapped(config: RunConfig) -> bool:
    """Return whether workers read sums as pages of local files: no store, and no device."""
    places = [Directory(uri) for uri in (config.out, config.stats) if uri]
    return config.device == "cpu" and all(place.is_local for place in places)


def chosen_device(device: str, address: str) -> Literal["cpu", "cuda"]:
    """Return where workers compute; ``device`` is as given, ``address`` that of the cluster.

    ``auto`` is what the workers have: CUDA on a cluster with any GPU, or that can grow one; without
    a cluster, on a machine with one.

    Raises:
        ClusterError: the cluster cannot be asked.
    """
    if device != "auto":
        return "cuda" if device == "cuda" else "cpu"
    if address == "local":
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    from orchestrator.cluster import most_gpus  # imports Ray: seconds, where none is asked

    try:
        return "cuda" if most_gpus(address) > 0 else "cpu"
    except ClusterError as error:
        hint = f"{error.hint}; a plan with --device cpu or cuda asks no cluster"
        raise ClusterError(str(error), hint=hint) from error


def usable_gib(device: str, workers: int) -> float:
    """Return a worker's share of this machine, or of the smallest device here: it has one alone."""
    if device == "cuda":
        import torch

        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        if found:
            return float(min(each.total_memory for each in found) * USABLE_DEVICE / GIB)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB * USABLE / workers
