"""Advice for a plan that does not fit: the cheapest changes that fit, each checked by planning."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from planners.batching import TokenBatching
from planners.errors import PlanError
from planners.method import MethodSpec, Option

MOST = 3  # suggestions
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """The parts of a plan that can be changed to make it fit.

    Attributes:
        spec: of the method.
        options: of the method.
        batching: of the calibration tokens.
        worker_bytes: memory of a worker.
    """

    spec: MethodSpec
    options: Mapping[str, Option]
    batching: TokenBatching
    worker_bytes: int


def ways_to_fit(
    attempt: Attempt,
    shortfall: Callable[[Attempt], int],
    *,
    others: Sequence[tuple[MethodSpec, Mapping[str, Option]]],
) -> list[str]:
    """Return up to three suggestions that fit, cheapest first, each with what it costs.

    Args:
        attempt: the plan that does not fit.
        shortfall: attempt -> bytes that a worker lacks; raises PlanError if it cannot be planned.
        others: methods that may fit if this one does not, with their options.
    """
    found = []
    for text, tried in _candidates(attempt, others):
        try:
            missing = shortfall(tried)
        except PlanError:
            continue
        if missing <= 0:
            found.append(text)
    memory = attempt.worker_bytes + shortfall(attempt)
    enough = f"--worker-gib {memory / GIB:.2f} or more: workers with that much memory"
    # More memory always fits; it comes last because it costs money.
    return [*found[: MOST - 1], enough]


def _candidates(
    attempt: Attempt, others: Sequence[tuple[MethodSpec, Mapping[str, Option]]]
) -> Iterator[tuple[str, Attempt]]:
    """Yield (text, attempt), cheapest first; those that keep the result come before others."""
    batching = attempt.batching
    size = batching.microbatch_sequences
    while size > 1:
        size = (size + 1) // 2
        fewer = replace(batching, microbatch_sequences=size)
        calls = -(-batching.microbatch_sequences // size)
        words = f"--microbatch-tokens {fewer.microbatch_tokens}"
        yield f"{words}: {calls} times as many calls in each pass", replace(attempt, batching=fewer)
        if batching.dtype == "float32":
            yield (
                f"{words} --calibration-dtype bfloat16: statistics from activations "
                "with 8 bits of precision",
                replace(attempt, batching=replace(fewer, dtype="bfloat16")),
            )
    if batching.dtype == "float32":
        yield (
            "--calibration-dtype bfloat16: statistics from activations with 8 bits of precision",
            replace(attempt, batching=replace(batching, dtype="bfloat16")),
        )
    yield from _options(attempt)
    smallest = replace(attempt, batching=replace(batching, microbatch_sequences=1))
    tokens = batching.sequence_length
    for spec, options in others:
        words = f"--method {spec.name}: a different method and result"
        yield words, replace(attempt, spec=spec, options=options)
        yield (
            f"--method {spec.name} --microbatch-tokens {tokens}: a different method and result",
            replace(smallest, spec=spec, options=options),
        )


def _options(attempt: Attempt) -> Iterator[tuple[str, Attempt]]:
    """Yield the same method with fewer modules, or without the refit."""
    if attempt.options.get("refit"):
        yield (
            "--option refit=false: a higher perplexity",
            replace(attempt, options={**attempt.options, "refit": False}),
        )
    modules = [m for m in str(attempt.options.get("modules", "")).split(",") if m]
    for module in modules if len(modules) > 1 else []:
        left = ",".join(m for m in modules if m != module)
        yield (
            f"--option modules={left}: {module} is not compressed, the others are compressed more",
            replace(attempt, options={**attempt.options, "modules": left}),
        )
