"""A plan from integers alone: nothing is downloaded, no weight is read, no token is cut."""

import re
from dataclasses import dataclass
from typing import Any

from actors import methods
from actors.storage.checkpoint import read_json
from actors.storage.files import Directory
from orchestrator.chain import StepInput, planned
from orchestrator.config import DEFAULT_SEQUENCE_LENGTH, RunConfig, resolve_steps
from planners.catalogue import CONFIGS
from planners.compose import require_disjoint
from planners.cost import dense_start
from planners.errors import ConfigError, ModelError
from planners.families import family_of
from planners.plan import RunPlan
from planners.planning import Workload

SEQUENCES = 128  # of calibration, where the recipe does not say
GB = 10**9  # vendors count device memory in these
RESERVED = 0.9  # of a device's memory is a worker's; the rest is the driver's and the allocator's


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What a cluster would have.

    Attributes:
        count: devices, one worker each.
        name: as given.
        bytes: usable memory of each.
    """

    count: int
    name: str
    bytes: int


def parse_cluster(text: str) -> Devices:
    """Return the devices that ``8xA100-80GB`` says.

    Raises:
        ConfigError: the text is not of that form.
    """
    match = re.fullmatch(r"(\d+)x([A-Za-z0-9]+(?:-[A-Za-z0-9]+)*?)-(\d+)GB", text)
    if match is None or int(match[1]) < 1 or int(match[3]) < 1:
        raise ConfigError(f"--cluster {text}: must be COUNTxNAME-MEMORYGB, such as 8xA100-80GB")
    return Devices(count=int(match[1]), name=match[2], bytes=int(int(match[3]) * GB * RESERVED))


def config_of(model: str) -> dict[str, Any] | None:
    """Return a model's config where it is known without weights, else None."""
    if model in CONFIGS:
        return dict(CONFIGS[model])
    directory = Directory(model)
    if "://" in model or directory.is_local:
        return read_json(directory, "config.json") if directory.size("config.json") else None
    return None


def forecast(config: RunConfig, devices: Devices | None) -> list[RunPlan]:
    """Return the plans of a recipe's steps for a model of which only the config is known.

    Raises:
        ConfigError: an option is wrong, or the target is out of reach.
        ModelError: the config is missing, or not of a supported model.
        PlanError: a layer does not fit a worker; the message says by how many bytes.
    """
    found = config_of(config.model)
    if found is None:
        raise ModelError(
            f"{config.model}: its config is not known without a download",
            hint=f"give a directory with a config.json, or one of: {', '.join(CONFIGS)}",
        )
    dtype = str(found.get("dtype") or found.get("torch_dtype") or "float32")
    shape = family_of(str(found.get("model_type"))).shape_of(found, dtype)
    specs = [methods.spec(step.method) for step in config.chain]
    steps = list(zip(specs, resolve_steps(config, specs), strict=True))
    require_disjoint(steps)
    longest = min(DEFAULT_SEQUENCE_LENGTH, int(found.get("max_position_embeddings", 2048)))
    length = config.calibration.sequence_length or longest
    sequences = config.calibration.sequences or SEQUENCES
    workers = devices.count if devices else config.workers
    memory = devices.bytes if devices else int((config.worker_gib or 1e6) * 2**30)
    work = Workload(
        sequences=sequences,
        sequence_length=length,
        microbatch_sequences=max(1, config.calibration.microbatch_tokens // length),
        compute_dtype=dtype if devices else "float32",
        num_workers=workers,
        worker_bytes=memory,
    )
    source = StepInput(config=found, shape=shape, start=dense_start(shape))
    plans = []
    for index, step in enumerate(steps):
        path = f"steps[{index}]" if config.steps else ""
        plans.append(planned(step, config.chain[index].target, source, work, path=path))
        source = source.after(plans[-1].form)
    return plans
