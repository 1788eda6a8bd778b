"""The context that every phase of a run receives."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from actors.messages import CompressionJob, UnitDone, WorkerSetup
from orchestrator.backend.executor import Executor
from orchestrator.engine.dispatch import run_units
from orchestrator.engine.fresh_process import EvaluatorProcess
from orchestrator.engine.work_context import WorkContext
from orchestrator.engine.worker_pool import Pool
from orchestrator.prepare.prepared import Prepared, teacher_of
from orchestrator.rundir.journal import Journal
from orchestrator.rundir.layout import CALIBRATION_TOKENS, RESULT
from planners.canonical_json import fingerprint, to_json
from planners.model.cost import model_parameters
from planners.model.form import ModelForm
from planners.model.serving_load import LayerTimes
from planners.recovery import SHRUNK
from planners.steps import is_identity
from planners.units.kinds import KINDS, MODEL
from planners.units.units import (
    RecoveryUnits,
    Unit,
    carried_units,
    compression_units,
    recovery_units,
    refit_units,
    statistics_units,
)


@dataclass(frozen=True, kw_only=True)  # no slots: its units are made once, and kept
class RunContext(WorkContext):
    """A run in progress, or one step of it: its plan, its records and its workers.

    Its units follow from these fields: other widths make another context.

    Attributes:
        prepared: the prepared run.
        form: widths of the result; final once they are allocated.
        makers: of each layer, module -> the method that shrinks it, where several compete.
        turned: the step before, where its statistics are carried over instead of measured again.
        steps: the steps before, as the report describes them.
        served: under which constraint the widths were chosen, and the predicted damage of those
            that were compared; empty where none was.
        times: of layers, measured where a speed-up is asked for.
    """

    prepared: Prepared
    form: ModelForm
    makers: tuple[Mapping[str, str], ...] = ()
    turned: "RunContext | None" = None
    steps: tuple[Mapping[str, Any], ...] = ()
    served: Mapping[str, Any] = field(default_factory=dict)
    times: LayerTimes | None = None

    @cached_property
    def sums(self) -> tuple[Unit, ...]:
        """The statistics units, one a layer."""
        prepared = self.prepared
        if self.turned is not None:
            layers = [unit for unit in self.turned.made if unit.kind in ("layer", "draft")]
            before = self.turned.sums
            shape = prepared.plan.shape
            return tuple(
                carried_units(prepared.identity, prepared.statistics, before, layers, shape)
            )
        return tuple(statistics_units(prepared.identity, prepared.statistics, prepared.plan.shape))

    @cached_property
    def made(self) -> tuple[Unit, ...]:
        """The stream, basis, layer, embedding and head units of the method."""
        prepared = self.prepared
        units = compression_units(
            self.sums,
            spec=prepared.spec,
            options=prepared.options,
            form=self.form,
            num_microbatches=prepared.identity.batching.num_microbatches,
            makers=self.makers,
        )
        return tuple(self._with_own_options(unit) for unit in units)

    def _with_own_options(self, unit: Unit) -> Unit:
        """Return a layer's unit with the options of that layer in its fingerprint."""
        own = self.prepared.config.layer_options.get(unit.index)
        if not own or not KINDS[unit.kind].own_options:
            return unit
        key = {"of": unit.fingerprint, "layer options": to_json(own)}
        return replace(unit, fingerprint=fingerprint(key))

    @cached_property
    def refitting(self) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
        """The units of the second pass and the layers it results in; both empty without refit."""
        drafts = [unit for unit in self.made if unit.kind == "draft"]
        chain, chosen = refit_units(drafts) if drafts else ((), ())
        return tuple(chain), tuple(chosen)

    @cached_property
    def shrunk(self) -> tuple[Unit, ...]:
        """All units whose files or bases are in the model that the method made."""
        made = [unit for unit in self.made if unit.lasting and unit.kind != "draft"]
        return (*self.refitting[1], *made)

    @cached_property
    def recovering(self) -> RecoveryUnits | None:
        """The units that train that model; None where the recipe does not ask for it."""
        prepared = self.prepared
        if prepared.recovery is None:
            return None
        return recovery_units(
            [unit for unit in self.shrunk if KINDS[unit.kind].leaves == MODEL],
            prepared.recovery,
            tokens_hash=prepared.recovery_hash,
            teacher=teacher_of(prepared).identity,
            identity=prepared.identity,
        )

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """All units whose files or bases are in the result."""
        if self.recovering is None:
            return self.shrunk
        bases = [unit for unit in self.shrunk if KINDS[unit.kind].leaves != MODEL]
        return (*self.recovering.kept, *bases)

    @property
    def is_idle(self) -> bool:
        """Whether it is an earlier step that removes nothing, so that its output is its input."""
        prepared = self.prepared
        is_last = bool(prepared.config.steps) or not self.steps
        return not is_last and is_identity(prepared.start.form, self.form, prepared.spec)

    def do(self, units: Sequence[Unit], **other: Any) -> None:
        """Do all units that have no record, each on any free worker.

        Args:
            units: each after its inputs.
            other: fields of the job that differ from the run's own, such as another method.

        Raises:
            CompressionError: a unit's own error, or a unit failed the same way too often.
            KeyboardInterrupt: the user asked to stop; running units were finished and recorded.
        """
        job = replace(self.job(), **other)
        run_units(self.pool, units, job, ledger=self.ledger, journal=self.journal)

    def answered(
        self, process: EvaluatorProcess, unit: Unit, method: str, request: object
    ) -> UnitDone:
        """Return an evaluator's answer to a request, and emit its event; write no record."""
        done = process.answer(unit.name, method, request, supervisor=self.pool.supervisor)
        self.journal.emit(
            unit.kind, unit=unit.name, worker=done.worker, start=done.started, seconds=done.seconds
        )
        return done

    @property
    def parameters_after(self) -> int:
        """Distinct elements of the result."""
        return model_parameters(self.prepared.plan.shape, self.form)

    def job(self) -> CompressionJob:
        """Return what compression units share, with the current files of the statistics."""
        prepared = self.prepared
        return CompressionJob(
            run_uri=self.run.uri,
            checkpoint_uri=prepared.model_uri,
            model_store=prepared.config.model_store,
            sums={unit.index: self.ledger.files(unit) for unit in self.sums},
            method=prepared.spec.name,
            options=prepared.options,
            layer_options=prepared.config.layer_options,
            shape=prepared.plan.shape,
            form=self.form,
            tokens=CALIBRATION_TOKENS,
            batching=prepared.identity.batching,
            former=None if self.turned is None else self.turned.job(),
            makers=self.makers,
            candidates={c.spec.name: dict(c.options) for c in prepared.spec.candidates[1:]},
            statistics_dtype=prepared.identity.statistics_dtype,
            contents=prepared.contents,
            in_flight_bytes=prepared.plan.in_flight_bytes,
            folder=SHRUNK if prepared.recovery is not None else RESULT,
            recovery=prepared.recovery,
            save_steps=prepared.config.recover.save_steps,
        )


def new_pool(prepared: Prepared, executor: Executor, journal: Journal) -> Pool:
    """Start the workers of a run: as many as the widest wave of any of its steps has stages."""
    setup = WorkerSetup(
        name="pattern",
        incarnation="",
        threads=prepared.config.threads,
        device=prepared.config.device,
    )
    return Pool(
        executor,
        setup,
        num_workers=max(step.plan.num_workers for step in (*prepared.former, prepared)),
        journal=journal,
        place_seconds=prepared.config.place_seconds,
    )


def new_evaluator(prepared: Prepared, executor: Executor) -> EvaluatorProcess:
    """Return the process that verifies and times the result; it is not started yet."""
    config = prepared.config
    return EvaluatorProcess(
        executor,
        threads=config.threads,
        device=config.device,
        shares=config.address == "local",
    )
