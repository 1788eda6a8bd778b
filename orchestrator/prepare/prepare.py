"""Validate a recipe, its model and its data, and plan the run, before workers are reserved."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from actors import methods
from actors.storage import validate
from actors.storage.checkpoint import Checkpoint
from actors.storage.contents import revision_of, tokenizer_hash
from actors.storage.files import Directory
from actors.storage.sources import resolve_model, resolve_store
from actors.storage.tokens import prepare_tokens, tokens_hash
from orchestrator.prepare.evaluation_plan import exact_dtype
from orchestrator.prepare.machine import chosen_device, usable_gib, workload_of
from orchestrator.prepare.prepared import Prepared, with_workspace
from orchestrator.prepare.recovery import (
    checked,
    other_teacher,
    recovery_of,
    recovery_text,
)
from orchestrator.prepare.steps import StepInput, chained, planned, started
from orchestrator.recipe.config import Facts, RunConfig, resolved, with_tokens
from orchestrator.recipe.method_options import chosen_methods, resolve_layer_options, resolve_steps
from planners.batching import batching_of
from planners.budget.schemes import SCHEMES
from planners.errors import ConfigError, ModelError
from planners.families import family_of
from planners.steps import require_disjoint
from planners.units.units import Identity


def prepare(given: RunConfig, *, only_plan: bool = False) -> Prepared:
    """Return a run whose model, data, method and plan have been checked.

    The whole model is read, to hash it and to check that its values are finite.

    Args:
        given: the recipe.
        only_plan: the run will not start: do not read the weights of models of 1 GB and more,
            unless they must be compared with the model of reused statistics. The run then has no
            revision.

    Raises:
        ConfigError: an option is wrong, or the target cannot be met.
        ModelError: the model is missing, broken or not supported.
        DataError: there is too little text, or it cannot be read.
        StorageError: the name of the run directory is not valid.
        ClusterError: ``device`` is auto, and the cluster cannot be reached to choose it.
    """
    named = [methods.spec(step.method) for step in given.chain]
    options = resolve_steps(given, named)
    specs = chosen_methods(given, options)
    require_disjoint(list(zip(specs, options, strict=True)))
    if specs[-1].quantises or SCHEMES.name in options[-1]:
        _require_loader()
    if given.out:
        Directory(given.out)  # checks the name before anything prints it
    source = resolve_model(given.model, copy=given.address == "local")
    store = resolve_store(given.model_store)
    checkpoint = Checkpoint(source.uri, model_store=store)
    shape = checkpoint.shape
    validate.check(checkpoint)
    unread = only_plan and not given.stats and not checkpoint.is_small
    contents = {} if unread else checkpoint.contents
    revision = revision_of(contents) if contents else ""
    device = chosen_device(given.device, given.address)
    facts = Facts(
        model_name=source.name,
        longest=longest_sequence(checkpoint.config),
        options=options,
        device=device,
        calibration_dtype=exact_dtype(device, shape.dtype),  # type: ignore[arg-type] # validated above
        worker_gib=round(usable_gib(device, given.workers), 1),
    )
    layer_options = resolve_layer_options(specs[0], given.layer_options)
    config = resolved(given, facts).model_copy(
        update={"layer_options": layer_options, "model_store": store}
    )
    calibration, evaluation = _tokens(config, source.uri, shape.vocab_size)
    config = with_tokens(config, facts, calibration=calibration.shape, evaluation=evaluation.shape)
    batching = batching_of(
        *calibration.shape,
        microbatch_tokens=config.calibration.microbatch_tokens,
        dtype=config.calibration_dtype,
        shards=config.calibration.shards,
    )
    text = recovery_text(config, calibration, source.uri, shape.vocab_size)
    recovery = recovery_of(config, *text.shape)
    work = replace(workload_of(config, batching, device=device), recovery=recovery)
    start = started(shape, config.dtype)
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
        plan=planned(
            steps[0], with_workspace(config.targets[0], shape, start), dense, work, path=path
        ),
        identity=Identity(
            model_revision=revision,
            calibration_hash=tokens_hash(calibration),
            batching=batching,
            threads=config.threads,
            device=config.device,
            statistics_dtype=config.statistics_dtype,
        ),
        calibration=calibration,
        evaluation=evaluation,
        evaluation_hash=tokens_hash(evaluation),
        source_bytes=checkpoint.total_bytes,
        statistics_uri=config.stats,
        start=start,
        work=work,
        recovery=recovery,
        recovery_tokens=text.tokens if recovery else None,
        recovery_hash=text.key if recovery else "",
        teacher=other_teacher(config, shape.vocab_size),
    )
    return checked(chained(first, steps, checkpoint))


def _require_loader() -> None:
    """Check that the package is there with which a quantised result is loaded and verified.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("compressed_tensors") is None:
        raise ConfigError(
            "quantised results are verified by loading them, which needs the package "
            "compressed-tensors",
            hint="pip install 'compress-cluster[quant]', on every machine that works on the run",
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


def longest_sequence(config: Mapping[str, Any]) -> int:
    """Return the longest sequence that a model takes, as its config says.

    Raises:
        ModelError: it says something else than a number above 1.
    """
    model_type = config.get("compressed_from", config["model_type"])
    defaults = family_of(model_type).defaults[model_type]
    longest = {**defaults, **config}.get("max_position_embeddings")
    if isinstance(longest, bool) or not isinstance(longest, int) or longest < 2:  # noqa: PLR2004
        raise ModelError(f"config.json: max_position_embeddings is {longest!r}; it must be above 1")
    return longest
