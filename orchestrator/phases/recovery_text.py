"""The text that a compressed model is trained on: read before the run, or written by its input."""

from actors.storage.tokens import tokens_to_parquet
from orchestrator.phases.context import RunContext
from orchestrator.phases.open_run import holds_tokens
from orchestrator.phases.self_text import self_text
from orchestrator.prepare.prepared import dense_subject
from orchestrator.prepare.recovery import prompts_of
from orchestrator.rundir.layout import RECOVERY_TOKENS


def write_text(context: RunContext) -> None:
    """Write the tokens of the recovery, unless they are there.

    Raises:
        CompressionError: the input model could not write them.
    """
    prepared, run = context.prepared, context.run
    assert prepared.recovery is not None  # called only then
    tokens = prepared.recovery_tokens
    if tokens is None:
        prompts = prompts_of(prepared)
        tokens = self_text(
            context,
            dense_subject(prepared),
            prompts,
            length=prepared.calibration.shape[1],
            seed=prepared.recovery.seed,
        )
    if holds_tokens(run, RECOVERY_TOKENS, tokens):
        return
    run.write(RECOVERY_TOKENS, tokens_to_parquet(tokens, {"source": prepared.config.recover.data}))
