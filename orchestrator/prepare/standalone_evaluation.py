"""Validate and plan an evaluation outside a run."""

from dataclasses import dataclass

import numpy as np

from actors.storage import validate
from actors.storage.checkpoint import Checkpoint
from actors.storage.sources import resolve_model, resolve_store
from actors.storage.tokens import prepare_tokens, tokens_hash
from orchestrator.prepare.evaluation_plan import EXACT, EvaluationPlan, Subject, own_dtype
from orchestrator.prepare.machine import GIB, chosen_device, usable_gib
from orchestrator.prepare.prepare import longest_sequence
from orchestrator.recipe.config import DEFAULT_SEQUENCE_LENGTH, RunConfig, check_length
from planners.batching import batching_of
from planners.memory.placement import load_of, place


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedEvaluation:
    """One checkpoint, dense or compressed, ready to be evaluated.

    Attributes:
        subject: the checkpoint.
        plan: stages and parts.
        ids: evaluation tokens, (sequences, tokens), int64.
        source: of the tokens, as in a recipe.
    """

    subject: Subject
    plan: EvaluationPlan
    ids: np.ndarray
    source: str


def prepare_evaluation(given: RunConfig) -> PreparedEvaluation:
    """Return a planned evaluation of the checkpoint that a recipe names as its model.

    Raises:
        ModelError: the checkpoint is missing, broken or not supported.
        ConfigError: the sequences are longer than the table of positions of the model.
        DataError: there is too little text, or it cannot be read.
        ClusterError: ``device`` is auto, and the cluster cannot be reached to choose it.
    """
    source = resolve_model(given.model, copy=given.address == "local")
    store = resolve_store(given.model_store)
    checkpoint = Checkpoint(source.uri, model_store=store)
    shape = checkpoint.shape
    validate.check_classes(checkpoint)
    device = chosen_device(given.device, given.address)
    own = "embedded" if given.model == "tiny" else "stdlib"
    text = given.evaluation.source or own
    held = text == "embedded" or text.startswith("tokens:")
    longest = longest_sequence(checkpoint.config)
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
    if shape.positions:  # with rope, sequences longer than in training are only worse
        check_length(ids.shape[1], longest, where="evaluation: has sequences of")
    batching = batching_of(
        *ids.shape,
        microbatch_tokens=given.calibration.microbatch_tokens,
        dtype=EXACT,
    )
    worker_gib = given.worker_gib or usable_gib(device, given.workers)
    load = load_of(shape, frozenset(), batching, start=checkpoint.form)
    return PreparedEvaluation(
        # No record is kept, so there is no need to read the weights for an identity.
        subject=Subject(name="model", uri=source.uri, identity="", model_store=store),
        plan=EvaluationPlan(
            family=shape.family,
            waves=place(shape, load, num_workers=given.workers, worker_bytes=int(worker_gib * GIB)),
            batching=batching,
            tokens_hash=tokens_hash(ids),
            threads=given.threads,
            device=device,
            own_dtype=own_dtype(device, shape.dtype),
        ),
        ids=ids,
        source=text,
    )
