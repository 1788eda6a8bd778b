"""What every phase of a run is handed."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from actors.messages import OF_A_LAYER, CompressionJob, TokenStream
from actors.storage.files import Directory
from orchestrator.journal import Journal
from orchestrator.ledger import Ledger
from orchestrator.pool import Pool
from orchestrator.prepare import Prepared
from planners.cost import model_parameters
from planners.plan import ModelForm, fingerprint, to_json
from planners.units import (
    Unit,
    carried_units,
    compression_units,
    refit_units,
    statistics_units,
)

CALIBRATION_TOKENS = "tokens/calibration.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkContext:
    """Where work is done and recorded, and who does it."""

    run: Directory
    ledger: Ledger
    journal: Journal
    pool: Pool

    @contextlib.contextmanager
    def phase(self, name: str, *, total: int) -> Iterator[None]:
        """Tell listeners that a phase of so many units begins, and how long it took.

        Raises:
            KeyboardInterrupt: the user asked to stop.
        """
        if self.pool.interruption.requested:
            raise KeyboardInterrupt  # between two phases: nothing is under way
        started = time.time()
        self.journal.tell("phase begins", unit=name, tokens=total)
        try:
            yield
        finally:
            self.journal.tell("phase ends", unit=name, start=started, seconds=time.time() - started)
            self.journal.flush()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunContext(WorkContext):
    """A run under way, or one step of it: what is to be done, what is done, and who does it.

    Attributes:
        prepared: what is to be done.
        form: widths of the result; not final before they are allocated.
        makers: of each layer, module -> the method that shrinks it, where several compete.
        turned: the step before, where its statistics are turned and not measured again.
        steps: what the steps before were, as a report says it.
    """

    prepared: Prepared
    form: ModelForm
    makers: tuple[Mapping[str, str], ...] = ()
    turned: "RunContext | None" = None
    steps: tuple[Mapping[str, Any], ...] = ()

    @property
    def sums(self) -> list[Unit]:
        """The statistics units, one a layer."""
        prepared = self.prepared
        if self.turned is not None:
            layers = [unit for unit in self.turned.made if unit.kind == "layer"]
            return carried_units(prepared.identity, prepared.statistics, self.turned.sums, layers)
        num_layers = prepared.plan.shape.num_layers
        return statistics_units(prepared.identity, prepared.statistics, num_layers)

    @property
    def made(self) -> list[Unit]:
        """The stream, basis, layer, embedding and head units of the method."""
        prepared = self.prepared
        size = prepared.identity.microbatch_sequences
        units = compression_units(
            self.sums,
            spec=prepared.spec,
            options=prepared.options,
            form=self.form,
            num_microbatches=-(-len(prepared.calibration) // size),
            makers=self.makers,
        )
        return [self._with_own_options(unit) for unit in units]

    def _with_own_options(self, unit: Unit) -> Unit:
        """Return a layer's unit as that of the options that it alone has."""
        own = self.prepared.layer_options.get(unit.index)
        if not own or unit.kind not in OF_A_LAYER:
            return unit
        key = {"of": unit.fingerprint, "layer options": to_json(own)}
        return replace(unit, fingerprint=fingerprint(key))

    @property
    def refitting(self) -> tuple[list[Unit], list[Unit]]:
        """The second pass and the layers that come of it; nothing where there is none."""
        drafts = [unit for unit in self.made if unit.kind == "draft"]
        return refit_units(drafts) if drafts else ([], [])

    @property
    def units(self) -> list[Unit]:
        """All units whose files or bases are in the result."""
        made = [unit for unit in self.made if unit.lasting and unit.kind != "draft"]
        return [*self.refitting[1], *made]

    @property
    def parameters_after(self) -> int:
        """Distinct elements of the result."""
        return model_parameters(self.prepared.plan.shape, self.form)

    @property
    def job(self) -> CompressionJob:
        """What the compression units share."""
        prepared = self.prepared
        return CompressionJob(
            run_uri=self.run.uri,
            checkpoint_uri=prepared.model_uri,
            model_store=prepared.config.model_store,
            sums={unit.index: self.ledger.files(unit) for unit in self.sums},
            method=prepared.spec.name,
            options=prepared.options,
            layer_options=prepared.layer_options,
            shape=prepared.plan.shape,
            form=self.form,
            stream=TokenStream(
                tokens=CALIBRATION_TOKENS,
                num_sequences=len(prepared.calibration),
                microbatch_sequences=prepared.identity.microbatch_sequences,
                dtype=prepared.identity.compute_dtype,
            ),
            former=None if self.turned is None else self.turned.job,
            makers=self.makers,
            candidates={c.spec.name: dict(c.options) for c in prepared.spec.candidates[1:]},
            statistics_dtype=prepared.identity.statistics_dtype,
            contents=prepared.contents,
        )
