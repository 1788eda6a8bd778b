"""A run that is ready to start: everything that was checked, decided and read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from actors.storage.files import Directory
from orchestrator.prepare.evaluation_plan import Subject
from orchestrator.recipe.config import RunConfig, size_of, size_text
from planners.canonical_json import SCHEMA_VERSION, to_json
from planners.memory.generation import workspace_bytes
from planners.method import MethodSpec, Option, Target
from planners.model.form import Start
from planners.model.shape import ModelShape
from planners.model.taps import Statistic
from planners.plan import RunPlan
from planners.planning import Workload
from planners.recovery import REVISION, Recovery
from planners.units.units import Identity


@dataclass(frozen=True, kw_only=True)  # no slots: facts is a cached property
class Prepared:
    """A run that is ready to start.

    Attributes:
        config: the recipe with every key resolved.
        given: the recipe as the user wrote it.
        model_uri: the input checkpoint.
        model_config: its ``config.json``.
        revision: its content hash; empty if a large model was planned for without reading it.
        contents: what the revision is the hash of (`actors.storage.contents`).
        tokenizer_hash: of the files copied into the result, generation_config.json among them.
        spec: of the method.
        options: of the method, complete.
        plan: widths, stages, waves and sizes.
        identity: what determines the bytes.
        calibration: token ids, (sequences, tokens), int64.
        evaluation: token ids, (sequences, tokens), int64.
        evaluation_hash: sha256 of the latter.
        source_bytes: bytes of the input's tensors.
        statistics_uri: another run whose statistics are reused, or empty.
        extra_statistics: summed too, because other methods will need them.
        start: widths of the input model, and what budgets are fractions of.
        work: how much data passes through the model.
        former: the steps before this one, where several methods are applied in turn. What depends
            on their results, such as the content hash of this one's input, is not known yet.
        recovery: how the result of the last step is trained, where the recipe asks for it.
        recovery_tokens: on what, (sequences, tokens), int64, those that are held out at the end;
            None where there is no recovery, and where the input model writes them.
        recovery_hash: of what determines these tokens; empty without recovery.
        teacher: whose logits are learnt, where it is not the input model.
        carries: the next step's statistics are rotated from this one's, not measured again.
        expected: the forecast of the run, for the report to compare with.
        begun: when the command that does it began, in seconds since the epoch; 0 if only the
            run's own phases count.
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
    recovery: Recovery | None = None
    recovery_tokens: np.ndarray | None = None
    recovery_hash: str = ""
    teacher: Subject | None = None
    carries: bool = False
    expected: Mapping[str, Any] = field(default_factory=dict)
    begun: float = 0.0

    @property
    def run(self) -> Directory:
        """The run directory."""
        return Directory(self.config.out)

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The statistics that the calibration pass sums."""
        return self.spec.statistics(self.plan.shape, self.options) | self.extra_statistics

    @property
    def title(self) -> str:
        """Model, methods and targets in one line."""
        parts = [self.config.model]
        for step in (*self.former, self):
            asked = step.config.target.asked
            if not asked:
                parts += [step.spec.name, size_text(step.config.target, step.options)]
                continue
            ((name, size),) = asked.items()
            said = size_of(round(size)) if name in ("fit", "keep_bytes") else f"{size}"
            parts += [step.spec.name, f"{name.partition('_')[0]} {said}"]
        return " · ".join(parts)

    @property
    def target(self) -> Target:
        """What is asked of the result of this step."""
        return with_workspace(self.config.target, self.plan.shape, self.start)

    @property
    def origin(self) -> "Prepared":
        """The first step, whose input is the model that the run started with."""
        return self.former[0] if self.former else self

    def asked(self) -> dict[str, Any]:
        """Return the method of this step and the requested size of its result."""
        return {"method": self.spec.name, **self.config.target.asked}

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The identity of the run: a change of any value makes it a different run."""
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
            # None, not empty: runs of older versions do not have the key.
            "layer options": self.config.layer_options or None,
            "candidate revisions": revisions(self.spec) or None,
            "keep_fraction": target.keep_fraction,
            "slice": target.slice,
            "speedup": target.speedup,
            "fit": target.fit,
            # None, not a value: runs of older versions do not have the keys.
            "keep_bytes": target.keep_bytes,
            "bits": target.bits,
            "serving": to_json(target.load) if target.speedup or target.fit else None,
        }
        return {
            "schema": SCHEMA_VERSION,
            "model revision": self.origin.revision or None,
            "tokenizer files": self.tokenizer_hash,
            "calibration data": self.identity.calibration_hash,
            "evaluation data": self.evaluation_hash,
            **(steps if self.former else only),
            "dtype": self.start.form.dtype or None,
            # None, not a value: runs of older versions do not have the keys.
            "recover": self.recovery and to_json(self.recovery),
            "recovery revision": self.recovery and REVISION,
            "recovery data": self.recovery_hash or None,
            "recovery teacher": self.teacher.identity if self.teacher else None,
            "microbatch sequences": self.identity.batching.microbatch_sequences,
            "shards": self.identity.batching.shards,
            "calibration_dtype": self.identity.batching.dtype,
            "statistics_dtype": self.identity.statistics_dtype,
            "threads": self.identity.threads,
            "device": self.identity.device,
        }


def with_workspace(target: Target, shape: ModelShape, start: Start) -> Target:
    """Return a target with the workspace of the input model, where it is a memory to fit."""
    if target.fit is None:
        return target
    return replace(target, workspace=workspace_bytes(shape, start.form, target.load))


def revisions(spec: MethodSpec) -> dict[str, int]:
    """Return method -> revision of those that compete; empty for a single method."""
    return {each.spec.name: each.spec.revision for each in spec.candidates}


def teacher_of(prepared: Prepared) -> Subject:
    """Return the model whose logits a result learns."""
    return prepared.teacher or dense_subject(prepared)


def dense_subject(prepared: Prepared) -> Subject:
    """Return the input model as a subject of evaluation."""
    origin = prepared.origin
    return Subject(
        name="dense",
        uri=origin.model_uri,
        identity=origin.revision,
        model_store=origin.config.model_store,
        contents=origin.contents,
    )
