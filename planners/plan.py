"""The plan of a run as data: the model, its result, and which stage holds which layers.

Everything here is frozen and converts to JSON and back, so that a plan can be written, read by
another process, compared and fingerprinted.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from planners.model.form import ModelForm, model_form_from_json
from planners.model.shape import ModelShape, shape_from_json


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """A contiguous run of layers held by one worker.

    Attributes:
        first: first layer.
        last: one past the last layer.
        embedding: this stage embeds the tokens.
        head: this stage computes losses.
        bytes: planned peak of its worker by kind: weights, statistics, boundaries, workspace.
    """

    first: int
    last: int
    embedding: bool
    head: bool
    bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Everything that is decided before the first tensor is read.

    Attributes:
        shape: of the model.
        form: of the result.
        waves: the stages of each chain that are in memory at one time.
        parameters_before: of the input model.
        parameters_after: of the result.
        bytes_before: of the weights of the input model, as stored.
        bytes_after: of those of the result.
        calibration_tokens: in total.
        calibration_flops: of the pass, all workers together.
        worker_bytes: planned peak of the fullest worker.
        disk_bytes: peak size of the run directory.
        chains: copies of the stages of a wave, each with shards of its own.
        in_flight_bytes: of those of a worker, what it may hold for the units before and after the
            one that it computes; 0 if it has no room for them.
        training_bytes: planned peak of a worker that trains the whole result, by kind; empty where
            none does.
        training_workers: the fewest who hold it together; several divide its layers.
    """

    shape: ModelShape
    form: ModelForm
    waves: tuple[tuple[StagePlan, ...], ...]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    calibration_tokens: int
    calibration_flops: int
    worker_bytes: int
    disk_bytes: int
    chains: int = 1
    in_flight_bytes: int = 0
    training_bytes: Mapping[str, int] = field(default_factory=dict)
    training_workers: int = 1

    @property
    def num_workers(self) -> int:
        """Workers that the widest wave uses."""
        return self.chains * max(map(len, self.waves))

    @property
    def keep_fraction(self) -> float:
        """Parameters after over parameters before, true counts."""
        return self.parameters_after / self.parameters_before


def run_plan_from_json(data: Mapping[str, Any]) -> RunPlan:
    """Return the plan that `to_json` wrote."""
    waves = tuple(tuple(StagePlan(**stage) for stage in wave) for wave in data["waves"])
    shape = shape_from_json(data["shape"])
    form = model_form_from_json(data["form"])
    return RunPlan(**{**data, "waves": waves, "shape": shape, "form": form})
