"""The worker that loads a finished checkpoint as users do, verifies it and measures its speed."""

import contextlib
import gc
import hashlib
import json
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.devices.memory import PeakMemory, release_freed_memory
from actors.messages import ThroughputRequest, UnitDone, VerifyRequest
from actors.modeling.outer_model import OuterModel
from actors.modeling.travelling import CODE, code_of
from actors.storage.checkpoint import Checkpoint
from actors.storage.copies import local_copy
from actors.storage.tensors import NAME_OF, TORCH_DTYPE, tensor_bytes
from actors.storage.validate import check_classes
from actors.worker.timing import timed
from planners.errors import ModelError
from planners.families import load as load_family
from planners.model.scheme import MXFP4, NVFP4, Scheme
from planners.overflow import overflowed

# Largest difference of logits between two orders of the same products, relative to their size.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
NEW_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check of a result."""

    name: str
    passed: bool
    detail: str


class Evaluator:
    """Runs in a process of its own, so that it sees a result only through its directory."""

    _peak: PeakMemory  # of the current request

    def __init__(self, threads: int, device: str) -> None:
        """Set threads; no model is loaded yet, and the device is not used before the first one.

        The process may wait for its first request while workers use the device.
        """
        torch.set_num_threads(threads)
        self._device = device

    @torch.inference_mode()
    def verify(self, unit: str, request: VerifyRequest) -> UnitDone:
        """Verify a checkpoint; the values are its checks, passed or failed."""
        started, begun = self._begin()
        checks = (
            _whole_checks(request, self._device) if request.whole else _stagewise_checks(request)
        )
        values = {"whole": request.whole, "checks": [asdict(check) for check in checks]}
        return self._done(unit, values, started, time.monotonic() - begun)

    @torch.no_grad()  # as users generate: graphs of an inference mode are compiled for that alone
    def throughput(self, unit: str, request: ThroughputRequest) -> UnitDone:
        """Time models; the values are name -> what `timed` returns."""
        started, begun = self._begin()
        with contextlib.ExitStack() as stack:
            models = {
                name: _loaded(stack.enter_context(local_copy(uri)), self._device)
                for name, uri in request.uris.items()
            }
            values = timed(models, request)
        return self._done(unit, values, started, time.monotonic() - begun)

    def _begin(self) -> tuple[float, float]:
        """Start a request as in a new process, without memory of an earlier one; return the time.

        The first is since the epoch, the second that of the monotonic clock.
        """
        gc.collect()
        release_freed_memory()
        if self._device == "cuda":
            torch.cuda.empty_cache()
        self._peak = PeakMemory(self._device)
        return time.time(), time.monotonic()

    def _done(
        self, unit: str, values: Mapping[str, object], started: float, seconds: float
    ) -> UnitDone:
        return UnitDone(
            unit=unit,
            worker="evaluator",
            incarnation="",
            device=self._device,
            files=(),
            values=values,
            started=started,
            seconds=seconds,
            peak_bytes=self._peak.bytes(),
        )


def _whole_checks(request: VerifyRequest, device: str) -> list[Check]:
    checks = []
    with local_copy(request.uri) as folder:
        checkpoint = Checkpoint(str(folder), model_store=request.model_store, device=device)
        if checkpoint.schemes or request.schemes:
            checks.append(_as_planned(checkpoint, request))
            if not checks[-1].passed:
                return checks  # a loader would not get far
        model = _loaded(folder, "cpu")
        checks.append(_same_tensors(model.state_dict(), request.tensors))
        model = model.to(device)
        if checkpoint.schemes:
            checks.append(_as_decoded(model, checkpoint))
        batch = torch.tensor(request.ids, device=device)
        logits = model(batch).logits
        finite = bool(torch.isfinite(logits).all())
        dtype = str(logits.dtype).removeprefix("torch.")
        detail = dtype if finite else f"some are NaN or infinite{overflowed(dtype)}"
        checks.append(Check(name="logits are finite", passed=finite, detail=detail))
        layer_by_layer = _stagewise_logits(checkpoint, batch, request.family, device)
        name = "logits equal those of the layers as computed"
        checks.append(_close(name, logits, layer_by_layer))
        if not checkpoint.schemes:
            model = model.float()
        elif not any(scheme.grid in (NVFP4, MXFP4) for scheme in checkpoint.schemes.values()):
            # Such a model is converted by its loader only, and small floats only to bfloat16.
            model = _loaded(folder, device, dtype=torch.float32)
        checks += _generation(model, batch)
    return checks


def _as_planned(checkpoint: Checkpoint, request: VerifyRequest) -> Check:
    """Check that the config has the schemes that were planned, and the files their parts."""
    planned = checkpoint.schemes if request.schemes is None else request.schemes
    other = sorted(
        name
        for name in {*planned, *checkpoint.schemes}
        if planned.get(name) != checkpoint.schemes.get(name)
    )
    detail = f"of {len(planned)} matrices" if not other else f"differ or missing: {other[:3]}"
    if not other:
        try:
            check_classes(checkpoint)
        except ModelError as error:
            return Check(name="bits and groups as planned", passed=False, detail=str(error))
    return Check(name="bits and groups as planned", passed=not other, detail=detail)


def _as_decoded(model: Any, checkpoint: Checkpoint) -> Check:
    """Check that a loader finds the weights that were written; it decodes the model."""
    model(torch.zeros(1, 1, dtype=torch.int64, device=model.device))  # decodes all matrices
    wrong = [
        name
        for name, scheme in checkpoint.schemes.items()
        if not _decoded(model.get_submodule(name).weight, checkpoint, name, scheme)
    ]
    detail = f"{len(checkpoint.schemes)} matrices, by compressed-tensors"
    detail = detail if not wrong else f"differ: {wrong[:3]}"
    name = "quantised weights are decoded to what was computed"
    return Check(name=name, passed=not wrong, detail=detail)


def _decoded(weight: Tensor, checkpoint: Checkpoint, name: str, scheme: Scheme) -> bool:
    expected: Tensor = checkpoint.read(f"{name}.weight").to(weight.device, weight.dtype)
    if scheme.grid in (NVFP4, MXFP4):  # decoded in bfloat16
        return bool(torch.allclose(weight.float(), expected.float(), rtol=2**-7, atol=0))
    return torch.equal(weight, expected)


def _stagewise_checks(request: VerifyRequest) -> list[Check]:
    """Check a result that does not fit into memory: one tensor at a time, without generation."""
    checkpoint = Checkpoint(request.uri, model_store=request.model_store)
    present = [name for name in request.tensors if name in checkpoint.locations]
    bad = [n for n in present if _sha256(checkpoint.read_stored(n)) != request.tensors[n]["sha256"]]
    missing = sorted(set(request.tensors) ^ set(checkpoint.locations))
    detail = f"{len(request.tensors)} tensors, read one at a time"
    if bad or missing:
        detail = f"differ: {bad[:3]}; missing or unexpected: {missing[:3]}"
    return [Check(name="every tensor as computed", passed=not bad + missing, detail=detail)]


def _loaded(folder: Path, device: str, dtype: Any = "auto") -> Any:
    """Load a model as the README tells users to; only our own code in a result is run."""
    from transformers import AutoModelForCausalLM

    ours = _brings_our_code(folder)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, trust_remote_code=ours, local_files_only=True
    )
    return model.to(device).eval()


def _brings_our_code(folder: Path) -> bool:
    """Return whether there is code beside the weights; raise if it is not our own.

    Raises:
        ModelError: the code differs from that of this version.
    """
    file = folder / CODE
    if not file.exists():
        return False
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    if file.read_bytes() != code_of(model_type):
        raise ModelError(f"{file}: differs from the code of this version, and is not run")
    return True


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def _same_tensors(state: Mapping[str, Tensor], expected: Mapping[str, Mapping[str, Any]]) -> Check:
    """Compare every tensor of a loaded model with the hash of the computed bytes."""

    def differs(name: str) -> bool:
        facts = expected[name]
        if name not in state or list(state[name].shape) != facts["shape"]:
            return True
        # Scales are loaded in the dtype of the model, which holds them exactly.
        scale = name.endswith(".weight_scale") and state[name].is_floating_point()
        tensor = state[name].to(TORCH_DTYPE[facts["dtype"]]) if scale else state[name]
        return bool(NAME_OF[tensor.dtype] != facts["dtype"] or _sha256(tensor) != facts["sha256"])

    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:  # a hash holds no interpreter
        wrong = [n for n, bad in zip(expected, threads.map(differs, expected), strict=True) if bad]
    stored = {tensor.data_ptr() for name, tensor in state.items() if name in expected}
    extra = [n for n, t in state.items() if n not in expected and t.data_ptr() not in stored]
    detail = f"{len(expected)} tensors, bit for bit"
    if wrong or extra:
        detail = f"differ or missing: {wrong[:3]}; not in the plan: {extra[:3]}"
    return Check(name="every tensor as computed", passed=not wrong + extra, detail=detail)


def _stagewise_logits(
    checkpoint: Checkpoint, batch: Tensor, family_name: str, device: str
) -> Tensor:
    """Return the logits of a checkpoint by passing its layers one at a time, as a stage does."""
    family = load_family(family_name)
    dtype = getattr(torch, checkpoint.dtype)
    outer = OuterModel(checkpoint.config, family, dtype=dtype, device=device)
    outer.read_embedding(checkpoint)
    hidden = outer.embed(batch)
    arguments = outer.layer_arguments(hidden)
    for index in range(checkpoint.config["num_hidden_layers"]):
        tensors = checkpoint.read_prefix(family.layer.format(i=index) + ".")
        hidden = outer.layer(index, tensors)(hidden, **arguments[index])
    outer.read_head(checkpoint)
    return outer.logits(hidden)


def _close(name: str, found: Tensor, expected: Tensor) -> Check:
    difference = float((found.float() - expected.float()).abs().max())
    size = float(expected.float().abs().max())
    tolerance = LOGIT_TOLERANCE[found.dtype]
    detail = f"largest difference {difference:.2e}, largest logit {size:.3g}"
    return Check(name=name, passed=difference <= tolerance * max(size, 1.0), detail=detail)


def _generation(model: Any, batch: Tensor) -> list[Check]:
    """Check cache and padding, in float32, so that ties of two logits do not look like errors."""
    prompt = batch[:1, : min(batch.shape[1] // 2, 32)]
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False,
               "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}  # fmt: skip
    cached = model.generate(prompt, use_cache=True, **options)
    plain = model.generate(prompt, use_cache=False, **options)
    same = bool(torch.equal(cached, plain))
    checks = [
        Check(name="greedy generation with and without cache is equal", passed=same,
              detail=f"{NEW_TOKENS} tokens after {prompt.shape[1]}")
    ]  # fmt: skip
    short = prompt.shape[1] // 2
    padded = prompt.repeat(2, 1)
    padded[1, :-short] = 0
    mask = torch.ones_like(padded)
    mask[1, :-short] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = model(padded, attention_mask=mask, position_ids=positions).logits[1, -short:]
    alone = model(prompt[:, -short:]).logits[0]
    checks.append(_close("a padded batch of two lengths gives the same logits", together, alone))
    return checks
