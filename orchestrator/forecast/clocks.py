"""Measured or estimated speeds of a device, kept for the next forecast."""

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from actors.storage.contents import cache_folder
from planners.batching import TokenBatching
from planners.canonical_json import fingerprint, to_json
from planners.errors import PlanError
from planners.method import Option, Target
from planners.model.shape import ModelShape
from planners.simulation.devices import rates_of
from planners.simulation.timetable import (
    CostModel,
)

LIBRARIES = ("torch", "transformers", "numpy", "safetensors")
CLOCK = TypeAdapter(CostModel)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileKey:
    """The setting that is timed.

    Attributes:
        config: the model's ``config.json``.
        shape: its integers.
        method: a file of ``actors/methods``.
        options: of the method, complete.
        target: size of the result, which sets the widths of the sample's result.
        data: of the run; a sample takes less of it.
        device: ``cpu`` or ``cuda``.
        threads: of a worker.
    """

    config: Mapping[str, Any]
    shape: ModelShape
    method: str
    options: Mapping[str, Option]
    target: Target
    data: TokenBatching
    device: str
    threads: int

    @property
    def key(self) -> dict[str, Any]:
        """What identifies a measurement."""
        shape = to_json(self.shape)
        del shape["num_layers"]  # a layer is timed, however many there are
        return {
            "device": device_name(self.device),
            "threads": self.threads,
            "versions": {name: metadata.version(name) for name in LIBRARIES},
            "shape": shape,
            "method": self.method,
            "options": to_json(self.options),
            "target": to_json(self.target),
            "dtype": self.data.dtype,
            "sequence_length": self.data.sequence_length,
            "microbatch_tokens": self.data.microbatch_tokens,
        }


def device_name(device: str) -> str:
    """Return the name of this machine's processor or accelerator."""
    if device == "cuda":
        import torch

        return str(torch.cuda.get_device_name())
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def kept_clock(setting: ProfileKey) -> CostModel | None:
    """Return the clock of an earlier measurement of this setting on this machine, or None."""
    try:
        found = json.loads(kept_path(setting).read_text(encoding="utf-8"))
        return CLOCK.validate_python(found["clock"])
    except (OSError, ValueError, LookupError, TypeError):
        return None  # none, torn, or of an older version: it is measured again or estimated


def keep_clock(setting: ProfileKey, clock: CostModel) -> None:
    """Store the measurement of a setting on this machine for later plans."""
    kept = {"clock": CLOCK.dump_python(clock, mode="json"), "key": setting.key}
    path = kept_path(setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}.tmp")
    new.write_text(json.dumps(kept, indent=1, sort_keys=True), encoding="utf-8")
    new.replace(path)


def estimated_clock(setting: ProfileKey, device: str) -> CostModel:
    """Return a clock estimated from the published peak rates of a device.

    Raises:
        PlanError: the device is unknown.
    """
    rates = rates_of(device, setting.data.dtype, threads=setting.threads)
    if rates is None:
        raise PlanError(f"the speed of a {device} is unknown")
    return CostModel(
        rates=rates, source=f"estimated from the published peak rates of {device}, not measured"
    )


def kept_path(setting: ProfileKey) -> Path:
    """Return the file of the measurement of a setting on this machine."""
    return cache_folder() / "measured" / f"{fingerprint(setting.key)[:16]}.json"
