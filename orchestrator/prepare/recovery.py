"""What a recipe asks of recovery, checked against the model and the data."""

from dataclasses import dataclass, replace

import numpy as np

from actors.storage.checkpoint import Checkpoint
from actors.storage.contents import revision_of
from actors.storage.sources import resolve_model
from actors.storage.tokens import prepare_tokens, tokens_hash
from orchestrator.backend.ray_training import require_train
from orchestrator.prepare.evaluation_plan import Subject
from orchestrator.prepare.prepared import Prepared, dense_subject
from orchestrator.prepare.self_text_plan import self_text_plan, text_identity
from orchestrator.recipe.config import RecoverConfig, RunConfig
from planners import recovery
from planners.budget.schemes import SCHEMES
from planners.errors import ConfigError, ModelError
from planners.recovery import Recovery
from planners.units.units import Unit

BATCH_TOKENS = 2048  # of a step, where the recipe does not say how many sequences
FEWEST = 2  # of them
PARTS = 2  # of a batch, if that can be divided so
CALIBRATION, SELF = "calibration", "self"


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """What a model is trained on.

    Attributes:
        tokens: (sequences, tokens), int64; None where the input model will write them.
        shape: of them.
        key: hash of what determines them.
    """

    tokens: np.ndarray | None
    shape: tuple[int, int]
    key: str


def recovery_text(
    config: RunConfig, calibration: np.ndarray, tokenizer_uri: str, vocab_size: int
) -> Text:
    """Return the text that a recipe trains on.

    Raises:
        ConfigError: the prompts are as long as the sequences.
        DataError: there is too little text, or it cannot be read.
    """
    how, length = config.recover, calibration.shape[1]
    if how.mode == "none":
        _require_mode(how)
    if how.data == CALIBRATION or how.mode == "none":
        return Text(tokens=calibration, shape=calibration.shape, key=tokens_hash(calibration))
    if how.data == SELF:
        if how.prompt_tokens >= length:
            raise ConfigError(
                f"recover.prompt_tokens: is {how.prompt_tokens}; sequences have {length} tokens",
                hint="use fewer",
            )
        return Text(tokens=None, shape=calibration.shape, key="")  # see `checked`
    tokens = prepare_tokens(
        how.data,
        split="calibration",
        tokenizer_uri=tokenizer_uri,
        vocab_size=vocab_size,
        sequence_length=length,
        num_sequences=_wanted(config, length),
        bos=config.calibration.bos,
        seed=config.seed,
        fewer=True,  # they are repeated
    )
    return Text(tokens=tokens, shape=tokens.shape, key=tokens_hash(tokens))


def _require_mode(how: RecoverConfig) -> None:
    """Refuse settings of a recovery that is not asked for.

    Raises:
        ConfigError: there are some.
    """
    other = [key for key, value in RecoverConfig() if getattr(how, key) != value]
    if other:
        raise ConfigError(
            f"recover.{other[0]}: is given, but nothing is trained",
            hint="add --recover local or --recover global, or remove it",
        )


def seed_of(config: RunConfig) -> int:
    """Return the seed of a recovery."""
    return config.seed if config.recover.seed is None else config.recover.seed


def other_teacher(config: RunConfig, vocab_size: int) -> Subject | None:
    """Return the model that a recipe names as the teacher; None where it is the input model.

    Raises:
        ConfigError: layers alone learn from no other model.
        ModelError: it is missing or broken, or has another vocabulary.
    """
    how = config.recover
    if not how.teacher or how.mode == "none":
        return None
    if how.mode == "local":
        raise ConfigError(
            "recover.teacher: layers that are trained alone learn the outputs of the layers they "
            "were made from",
            hint="use --recover global, or remove it",
        )
    source = resolve_model(how.teacher, copy=config.address == "local")
    checkpoint = Checkpoint(source.uri, model_store=config.model_store)
    if checkpoint.shape.vocab_size != vocab_size:
        raise ModelError(
            f"recover.teacher: {how.teacher} has a vocabulary of "
            f"{checkpoint.shape.vocab_size:,} tokens, the input model one of {vocab_size:,}",
            hint="use a model with the same tokenizer",
        )
    contents = checkpoint.contents
    return Subject(
        name="teacher",
        uri=source.uri,
        identity=revision_of(contents),
        contents=contents,
        model_store=config.model_store,
    )


def checked(prepared: Prepared) -> Prepared:
    """Return a run whose result can be trained, with what determines the text that it writes.

    Raises:
        ConfigError: the result is quantised, a package is missing, or layers of the teacher cannot
            stand in the place of its own.
        PlanError: the input model is to write the text, and is too large for that.
    """
    if prepared.recovery is None:
        return prepared
    if prepared.plan.form.is_quantised or SCHEMES.name in prepared.options:
        raise ConfigError(
            f"recover: {prepared.spec.name} rounds weights, and rounded weights cannot be trained",
            hint="recover the model before it is rounded: cut it with --recover to a plain "
            "checkpoint (--option servable=native), then run gptq on RUN/model",
        )
    if prepared.recovery.replace != "none":
        _require_same_stream(prepared)
    if prepared.recovery.mode == "global":
        require_train()
    if prepared.config.recover.data != SELF:
        return prepared
    units = text_units(prepared)
    return replace(prepared, recovery_hash=text_identity(units))


def _require_same_stream(prepared: Prepared) -> None:
    """Refuse to put layers of the teacher in the place of layers that read another stream.

    Raises:
        ConfigError: the bases, widths, family or number of layers differ.
    """
    rotates = next((s.spec.name for s in (*prepared.former, prepared) if s.spec.residual), "")
    if rotates:
        raise ConfigError(
            f"recover.replace: {rotates} rotates the residual stream, so layers of the input model "
            "cannot stand in the place of its own",
            hint="use another method, or remove it",
        )
    own, other = prepared.origin.plan.shape, prepared.origin.plan.shape
    if teacher := prepared.teacher:
        other = Checkpoint(teacher.uri, model_store=teacher.model_store).shape
    layers = len(prepared.plan.form.layers)
    if (own.model_type, layers, own.hidden) != (other.model_type, other.num_layers, other.hidden):
        raise ConfigError(
            f"recover.replace: the teacher is {other.model_type} with {other.num_layers} layers of "
            f"width {other.hidden}, the result {own.model_type} with {layers} of {own.hidden}",
            hint="learn from the input model, or remove it",
        )


def text_units(prepared: Prepared) -> list[Unit]:
    """Return the units in which the input model writes the text to train on.

    Raises:
        PlanError: it is too large for that.
    """
    plan = self_text_plan(
        prepared,
        prompt_tokens=prepared.config.recover.prompt_tokens,
        length=prepared.calibration.shape[1],
        seed=seed_of(prepared.config),
    )
    return plan.units(dense_subject(prepared), prompts_of(prepared))


def prompts_of(prepared: Prepared) -> np.ndarray:
    """Return the tokens that the input model continues, (sequences, tokens)."""
    return prepared.calibration[:, : prepared.config.recover.prompt_tokens]


def _wanted(config: RunConfig, length: int) -> int | None:
    """Return how many sequences of other text are read; None for all of a token file, else 128."""
    how = config.recover
    if how.tokens is None:
        return None
    needed = -(-how.tokens // length)
    held = how.held_out or recovery.held_out(needed)
    return needed + held


def recovery_of(config: RunConfig, num_sequences: int, length: int) -> Recovery | None:
    """Return how a recipe trains on so many sequences of a length; None if it does not.

    Raises:
        ConfigError: there are too few tokens for one step.
    """
    how = config.recover
    if how.mode == "none":
        return None
    if how.mode == "local" and how.loss == "labels":
        raise ConfigError(
            "recover.loss: layers that are trained alone have no labels",
            hint="use --recover global, or remove it",
        )
    _require_replaceable(how)
    held = how.held_out or recovery.held_out(num_sequences)
    batch = how.batch or max(FEWEST, BATCH_TOKENS // length)
    if num_sequences - held < batch:
        raise ConfigError(
            f"recover: a step needs {batch} sequences of {length} tokens, but of {num_sequences} "
            f"{held} are held out, which leaves {max(num_sequences - held, 0)}",
            hint="use more --calibration-sequences, or a smaller recover.batch",
        )
    parts = how.parts or next(p for p in range(min(PARTS, batch), 0, -1) if batch % p == 0)
    if batch % parts:
        raise ConfigError(
            f"recover.parts: is {parts}, which does not divide the {batch} sequences of a batch",
            hint="use a divisor, or another recover.batch",
        )
    tokens = how.tokens or num_sequences * length
    steps = tokens // (batch * length)
    if steps < 1:
        raise ConfigError(
            f"recover.tokens: is {tokens:,}, less than the {batch * length:,} of one step",
            hint="use more --recover-tokens, or a smaller recover.batch",
        )
    return Recovery(
        mode=how.mode,
        loss=how.loss,
        trains=how.trains,
        steps=steps,
        batch=batch,
        parts=parts,
        rates=tuple(sorted(set(how.learning_rates), reverse=True)),
        relative=how.relative,
        schedule=how.schedule,
        warmup=how.warmup,
        weight_decay=how.weight_decay,
        clip=how.clip,
        rank=how.rank,
        alpha=how.alpha,
        dropout=how.dropout,
        replace=how.replace,
        seed=seed_of(config),
        held_out=held,
        sequences=num_sequences,
        length=length,
    )


def _require_replaceable(how: RecoverConfig) -> None:
    """Refuse to put layers of the teacher in a place where there are none.

    Raises:
        ConfigError: layers are trained alone, or there is no teacher.
    """
    if how.replace == "none":
        return
    if how.mode == "local":
        raise ConfigError(
            "recover.replace: layers that are trained alone have no others beside them",
            hint="use --recover global, or remove it",
        )
    if how.loss == "labels":
        raise ConfigError(
            "recover.replace: with the loss labels there is no input model whose layers could "
            "stand in the place of others",
            hint="use the loss kl, or remove it",
        )
