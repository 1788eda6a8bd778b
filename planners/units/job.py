"""The parts of a run that determine its time, and the work of each kind of unit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from planners.batching import TokenBatching
from planners.budget.schemes import ROUNDED_TOKENS, SCHEMES
from planners.calibration import shard_cuts
from planners.method import MethodSpec, Option
from planners.model.cost import dense_model_form
from planners.model.form import ModelForm, site_dims
from planners.model.shape import ModelShape
from planners.model.taps import Statistic, layer_statistics
from planners.plan import RunPlan
from planners.recovery import SHARDS, Recovery
from planners.units import recovery_work, work
from planners.units.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The parts of a run, or of one step of it, that determine its time.

    Attributes:
        plan: its shapes, widths and waves.
        spec: of the method.
        options: of the method.
        data: batching of the calibration tokens.
        evaluation_tokens: on which each of the two models is evaluated.
        finish: verify and time the result, too.
        start: widths of the input model, where steps came before; None is the model itself.
        former: the steps before, where several methods are applied in turn.
        carried: its statistics are rotated from those of the step before.
        reused: statistics taken from another run.
        from_hub: its input is read from the Hub, by each worker that needs a part of it.
        recovery: how the result is trained, where it is.
    """

    plan: RunPlan
    spec: MethodSpec
    options: Mapping[str, Option]
    data: TokenBatching
    evaluation_tokens: int
    finish: bool = True
    start: ModelForm | None = None
    former: tuple["Job", ...] = ()
    carried: bool = False
    reused: frozenset[Statistic] = frozenset()
    from_hub: bool = False
    recovery: Recovery | None = None

    @property
    def origin(self) -> "Job":
        """The first step, which reads the input model of the run."""
        return self.former[0] if self.former else self

    @property
    def input(self) -> ModelForm:
        """Widths of the step's input model."""
        return self.start or dense_model_form(self.shape)

    @property
    def statistics(self) -> frozenset[Statistic]:
        """The statistics that the method needs of each layer."""
        return self.spec.statistics(self.shape, self.options)

    @property
    def summed(self) -> frozenset[Statistic]:
        """The statistics that this run sums itself."""
        return self.statistics - self.reused

    @property
    def dense(self) -> ModelShape:
        """Shape of the input model of the run."""
        return self.origin.shape

    @property
    def shape(self) -> ModelShape:
        """Shape of the model."""
        return self.plan.shape

    @property
    def form(self) -> ModelForm:
        """Widths of the result."""
        return self.plan.form

    @property
    def num_microbatches(self) -> int:
        """Microbatches of the calibration tokens."""
        return self.data.num_microbatches

    @property
    def shards(self) -> list[tuple[int, int]]:
        """Shards in ranges of microbatches, for a method that streams tokens from site to site."""
        return shard_cuts(int(self.options["shards"]), self.num_microbatches)

    def statistics_of(self, index: int) -> list[Statistic]:
        """Return the statistics that the method needs of one layer."""
        return layer_statistics(self.shape, self.statistics, index)

    def site_dim(self, site: int) -> int:
        """Return the width of a site in the result."""
        return site_dims(self.form)[site]


def adding(job: Job, index: int) -> Work:
    """Return the work of adding the sums of all shards of a layer."""
    wanted = layer_statistics(job.shape, job.summed, index)
    form = job.input.layers[index]
    return work.adding_work(job.shape, wanted, form, shards=job.data.shards)


def carrying(job: Job, index: int) -> Work:
    """Return the work of rotating the sums of a layer."""
    return work.carried_work(job.shape, job.statistics_of(index))


def measuring(job: Job, index: int) -> Work:
    """Return the work of measuring the damage of cuts of a layer."""
    start = job.input.layers[index]
    ladders = job.spec.ladders(job.shape, start, job.options).values()
    # On average a cut of the grid keeps half of a module.
    forms = [
        ladder.cut(start, ladder.sizes[len(ladder.sizes) // 2])
        for ladder in ladders
        if ladder.levels
    ]
    tokens = min(work.PROBE_TOKENS, job.data.tokens, int(job.options["probe_tokens"]))
    if SCHEMES.name in job.options:
        tokens = min(tokens, ROUNDED_TOKENS)
    return work.damage_work(job.shape, forms, job.data, start, tokens=tokens)


def timing(job: Job, index: int) -> Work:
    """Return the work of measuring how long layers take: seconds, whatever the model."""
    del job, index
    return work.CALL


def truncating(job: Job, index: int) -> Work:
    """Return the work of measuring the truncation losses of a layer's linears."""
    return work.losses_work(job.shape, job.form.layers[index], job.statistics_of(index))


def decomposing(job: Job, site: int) -> Work:
    """Return the work of computing the axes of one site."""
    if site == 2 * job.shape.num_layers and "resid_out" not in {s.tap for s in job.statistics}:
        return work.CALL  # kept whole: there is nothing to decompose
    return work.basis_work(job.shape, job.site_dim(site))


def decomposing_all(job: Job, _: int) -> Work:
    """Return the work of computing the axes that all sites share."""
    return work.basis_work(job.shape, job.form.embedding_dim, sites=job.shape.num_sites)


def decomposing_streamed(job: Job, site: int) -> Work:
    """Return the work of computing the axes of one site after compressed layers."""
    return work.basis_work(job.shape, job.site_dim(site), sites=len(job.shards))


def streaming(job: Job, index: int) -> Work:
    """Return the work of passing one shard to a site."""
    site, shard = divmod(index, len(job.shards))
    first, last = job.shards[shard]
    passed = job.data.microbatches[first:last]
    data = replace(job.data, sequences=passed[-1][1] - passed[0][0])
    before = max(site - 1, 0)
    form = job.form.layers[before // 2]
    return work.stream_work(job.shape, form, site, job.site_dim(before), data)


def shrinking(job: Job, index: int) -> Work:
    """Return the work of reading, shrinking and writing a layer."""
    return work.layer_work(
        job.shape,
        job.form.layers[index],
        job.statistics_of(index),
        residual=job.spec.residual,
        start=job.input.layers[index],
    )


def embedding(job: Job, _: int) -> Work:
    """Return the work of writing the embedding."""
    return work.table_work(job.shape, job.form.embedding_dim, residual=job.spec.residual)


def head(job: Job, _: int) -> Work:
    """Return the work of writing the head; a tied head has no columns to write."""
    width = 0 if job.form.tied else job.form.head_dim
    return work.table_work(job.shape, width, residual=job.spec.residual)


def refit_start(job: Job, _: int) -> Work:
    """Return the work of embedding the tokens for the second pass."""
    return work.refit_start_work(job.shape, job.data)


def refitting(job: Job, index: int) -> Work:
    """Return the work of refitting one layer."""
    form, start = job.form.layers[index], job.input.layers[index]
    return work.refit_layer_work(job.shape, form, job.data, start)


def refit_losses(job: Job, _: int) -> Work:
    """Return the work of the losses of the drafted and refitted models."""
    return work.refit_losses_work(job.shape, job.data)


def choosing(job: Job, index: int) -> Work:
    """Return the work of copying one layer into the result."""
    return work.chosen_work(job.shape, job.form.layers[index])


def passing_dense(job: Job, index: int) -> Work:
    """Return the work of passing a shard of the recovery's text through a layer of the input."""
    how, layer = _recovery(job), max(index // SHARDS - 1, 0)
    form = job.input.layers[layer]
    return recovery_work.passing(job.shape, form, job.data, tokens=how.data_tokens // SHARDS)


def recovering_layer(job: Job, index: int) -> Work:
    """Return the work of training one layer."""
    return recovery_work.layer_training(job.shape, job.form.layers[index], job.data, _recovery(job))


def recovering_model(job: Job, _: int) -> Work:
    """Return the work of training the whole model, all workers together."""
    return recovery_work.model_training(
        job.shape, job.form, job.dense, job.data, _recovery(job),
        divided=job.plan.training_workers > 1,
    )  # fmt: skip


def _recovery(job: Job) -> Recovery:
    assert job.recovery is not None  # else it has no such units
    return job.recovery
