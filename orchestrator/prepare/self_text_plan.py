"""How the input model writes the text that its compressed model is trained on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.storage.tokens import tokens_hash
from orchestrator.prepare.evaluation_plan import Subject, exact_dtype
from orchestrator.prepare.machine import GIB
from orchestrator.prepare.prepared import Prepared
from planners.canonical_json import SCHEMA_VERSION, fingerprint
from planners.errors import PlanError
from planners.memory.self_text import part_sequences, writing_load, writing_stages
from planners.plan import StagePlan
from planners.units.kinds import KINDS
from planners.units.units import Unit

REVISION = 1  # raised when the same prompts would be continued differently
KIND = "self_text"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTextPlan:
    """How prompts are continued, and how the work is divided.

    Attributes:
        family: names the model's tensors.
        stages: of a chain: the fewest workers that hold the whole model.
        part_sequences: sequences that are continued together; the bits depend on it.
        length: tokens of each sequence in the end.
        seed: of the random numbers.
        dtype: of the forward pass.
        threads: of a worker.
        device: class of device.
    """

    family: str
    stages: tuple[StagePlan, ...]
    part_sequences: int
    length: int
    seed: int
    dtype: str
    threads: int
    device: str

    def rows(self, sequences: int) -> list[tuple[int, int]]:
        """Return the sequences of each part, as first and one past the last."""
        starts = range(0, sequences, self.part_sequences)
        return [(a, min(a + self.part_sequences, sequences)) for a in starts]

    def units(self, subject: Subject, prompts: np.ndarray) -> list[Unit]:
        """Return one unit a part."""
        return [
            Unit(
                name=f"{KINDS[KIND].stem}-{index:05d}",
                kind=KIND,
                index=index,
                inputs=(),
                fingerprint=fingerprint(self._key(subject, prompts, rows)),
            )
            for index, rows in enumerate(self.rows(len(prompts)))
        ]

    def _key(
        self, subject: Subject, prompts: np.ndarray, rows: tuple[int, int]
    ) -> Mapping[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "kind": KIND,
            "revision": REVISION,
            "model": subject.identity,
            "prompts": tokens_hash(prompts[slice(*rows)]),
            "rows": list(rows),
            "length": self.length,
            "seed": self.seed,
            "dtype": self.dtype,
            "threads": self.threads,
            "device": self.device,
        }


def self_text_plan(
    prepared: Prepared, *, prompt_tokens: int, length: int, seed: int
) -> SelfTextPlan:
    """Return how the input model of a run continues prompts to sequences of ``length`` tokens.

    Raises:
        PlanError: the prompts are too long, or the workers do not hold the whole model.
    """
    if not 0 < prompt_tokens < length:
        raise PlanError(
            f"recover.prompt_tokens: is {prompt_tokens}; sequences have {length} tokens",
            hint=f"use 1 to {length - 1}",
        )
    origin, identity, config = prepared.origin, prepared.identity, prepared.config
    shape, form = origin.plan.shape, origin.start.form
    dtype = exact_dtype(config.device, shape.dtype)
    batch = part_sequences(
        shape,
        form,
        length=length,
        microbatch=identity.batching.microbatch_sequences,
        dtype=dtype,
    )
    load = writing_load(shape, form, batch=batch, prompt=prompt_tokens, length=length, dtype=dtype)
    return SelfTextPlan(
        family=shape.family,
        stages=writing_stages(
            shape,
            load,
            num_workers=max(step.plan.num_workers for step in (*prepared.former, prepared)),
            worker_bytes=int((config.worker_gib or 0) * GIB),
        ),
        part_sequences=batch,
        length=length,
        seed=seed,
        dtype=dtype,
        threads=identity.threads,
        device=identity.device,
    )


def text_identity(units: Sequence[Unit]) -> str:
    """Return a hash of what determines a text that is not written yet, by the units that do it."""
    return fingerprint([unit.fingerprint for unit in units])
