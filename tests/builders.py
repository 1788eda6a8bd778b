"""Small random models, tokens for them, and runs of them."""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from actors.storage.files import Directory
from actors.storage.records import read_records
from orchestrator.backend.executor import Executor
from orchestrator.backend.local import LocalExecutor
from orchestrator.phases.open_run import open_run
from orchestrator.prepare.prepare import prepare
from orchestrator.prepare.prepared import Prepared
from orchestrator.recipe.reading import load_config
from orchestrator.run import run_on
from orchestrator.rundir.journal import Event, Listener
from orchestrator.rundir.layout import HALF_WRITTEN
from planners.method import SIZES as TARGETS

VOCABULARY = 61  # odd, so that a table of it has no round size
LENGTH = 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def save_model(
    folder: Path,
    *,
    model_type: str = "llama",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "1GB",
    **sizes: Any,
) -> Path:
    """Write a random checkpoint with tokens for it in ``folder/tokens``; return the folder.

    Every weight is random, norms and biases too: nothing is left at a value that hides a fault.
    """
    config = AutoConfig.for_model(model_type, **{**SIZES, **sizes})
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_scaled(name, noise))
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    for split, num_sequences in (("calibration", 20), ("evaluation", 7)):
        save_tokens(folder / "tokens" / f"{split}.safetensors", num_sequences, seed=len(split))
    return folder


def _scaled(name: str, noise: Tensor) -> Tensor:
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    if "embed_tokens" in name:
        # Some directions weigh more than others, as in a trained model: there is something to keep.
        return noise * torch.linspace(1.5, 0.2, noise.shape[1])
    return noise / noise.shape[1] ** 0.5


def save_tokens(path: Path, num_sequences: int, *, length: int = LENGTH, seed: int = 0) -> Path:
    """Write random token ids as ``tokens:FILE`` reads them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (num_sequences, length), generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"input_ids": ids}, path)
    return path


def prepared_run(model: Path, out: Path | str, **recipe: Any) -> Prepared:
    """Return a run of a model of `save_model`, ready to start; ``recipe`` has keys of a recipe.

    ``source`` is where the model is read from, if not from its folder.
    """
    calibration = {
        "source": f"tokens:{model}/tokens/calibration.safetensors",
        "microbatch_tokens": 4 * LENGTH,
        **recipe.pop("calibration", {}),
    }
    evaluation = {
        "source": f"tokens:{model}/tokens/evaluation.safetensors",
        **recipe.pop("evaluation", {}),
    }
    sized = {*TARGETS, "steps"} & recipe.keys() or recipe.get("method") == "gptq"
    size = {} if sized else {"slice": 0.25}
    source = str(recipe.pop("source", model))
    given = {"model": source, "out": str(out), "device": "cpu", **size, **recipe,
             "calibration": calibration, "evaluation": evaluation}  # fmt: skip
    return prepare(load_config(None, given))


def worker_gib(model: Path, *, num_layers: int) -> float:
    """Return the memory of a worker that holds so many layers of a model and not one more."""
    plan = prepared_run(model, model / "unused").plan
    stage, shape = plan.waves[0][0], plan.shape
    table = shape.vocab_size * shape.hidden * 4
    held = {"weights", "statistics"}
    fixed = table + sum(size for kind, size in stage.bytes.items() if kind not in held)
    of_layers = sum(stage.bytes[kind] for kind in held) - 2 * table
    needed = fixed + of_layers * num_layers // (stage.last - stage.first)
    return (needed + 0.5) / 2**30  # whole bytes again, once it is rounded down


def run_local(model: Path, out: Path | str, **how: Any) -> dict[str, Any]:
    """Do a whole run and return its report.

    ``how`` is keys of a recipe, and ``executor`` and ``listener``: this process and nobody, if not
    given.
    """
    prepared, executor, listener = _opened(model, out, **how)
    return run_on(prepared, executor, listener=listener)


def compress_local(model: Path, out: Path | str, **how: Any) -> dict[str, float]:
    """Do a run whose driver dies before it verifies; return name -> perplexity.

    What takes the longest for a small model is thereby left out: verification, timing, the report.
    A dense model whose losses another run knows has none here.
    """
    prepared, executor, listener = _opened(model, out, **how)

    def die_before_verifying(event: Event) -> None:
        listener(event)
        if event["kind"] == "phase begins" and event["unit"] == "verify":
            raise DeadDriverError

    with contextlib.suppress(DeadDriverError):
        run_on(prepared, executor, listener=die_before_verifying)
    return {name: perplexity(out, name) for name in ("dense", "compressed") if _parts(out, name)}


class DeadDriverError(Exception):
    """A driver that is gone in the middle of its work."""


class DyingDriver:
    """A listener that ends the driver when so many events of some kind have been seen."""

    def __init__(self, kind: str, count: int, *, unit: str | None = None) -> None:
        self._kind, self._left, self._unit = kind, count, unit

    def __call__(self, event: Event) -> None:
        if event["kind"] == self._kind and self._unit in (None, event["unit"]):
            self._left -= 1
            if self._left == 0:
                raise DeadDriverError


def started(out: Path | str) -> dict[str, float]:
    """Return unit -> when the work that its record tells of began."""
    return {name: record.started for name, record in read_records(Directory(str(out))).items()}


def _opened(
    model: Path,
    out: Path | str,
    *,
    executor: Executor | None = None,
    listener: Listener | None = None,
    **recipe: Any,
) -> tuple[Prepared, Executor, Listener]:
    prepared = prepared_run(model, out, **recipe)
    open_run(prepared)
    return prepared, executor or LocalExecutor(), listener or _ignore


def _ignore(event: Event) -> None:
    del event


def perplexity(out: Path | str, name: str) -> float:
    """Return the perplexity of a model by the records of its evaluation alone."""
    parts = _parts(out, name)
    return math.exp(math.fsum(p["nats"] for p in parts) / sum(p["num_tokens"] for p in parts))


def _parts(out: Path | str, name: str) -> list[Any]:
    records = read_records(Directory(str(out)))
    return [r.values for unit, r in records.items() if unit.startswith(f"evaluation-{name}-")]


def result_files(out: Path) -> dict[str, bytes]:
    """Return name -> bytes of all files of a run's result.

    Without what killed workers were writing: that goes at the end of a run, and some end before.
    """
    model = out / "model"
    files = (p for p in model.rglob("*") if p.is_file() and p.suffix != HALF_WRITTEN)
    return {str(p.relative_to(model)): p.read_bytes() for p in files}


def layer_file(folder: Path, layer: int) -> Path:
    """Return the file of one layer in a result; the first of them all is the embedding's."""
    (path,) = folder.glob(f"model-{layer + 2:05d}-of-*.safetensors")
    return path


@torch.inference_mode()
def logits_of(folder: Path, ids: Tensor, *, trust_remote_code: bool = False) -> Tensor:
    """Return the logits of a checkpoint as its users get them, in float32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code, local_files_only=True
    )
    return model.eval()(ids).logits.float()
