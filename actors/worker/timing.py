"""Time models as users run them: prompts and new tokens, at several batches, in turn."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from actors.devices.memory import PeakMemory, release_freed_memory
from actors.messages import ThroughputRequest
from actors.worker.attention_kernels import AttentionKernels
from planners.timing import COMPILED, EAGER, FEWEST_ROUNDS, GRAPHS, finished, speeds

WARM_UP = 2  # steps before one is recorded: libraries start, and allocate


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What models are timed at.

    Attributes:
        batch: prompts at one time.
        mode: how a step for one token is made: ``eager``, or over a cache of a fixed size as
            ``CUDA graphs`` or by ``torch.compile``.
    """

    batch: int
    mode: str = EAGER


def timed(models: Mapping[str, Any], request: ThroughputRequest) -> dict[str, dict[str, Any]]:
    """Return for each model its speeds at every setting, and the kernels of its attention.

    ``settings`` has rows of tokens per second, medians over the rounds, with ``rounds`` in tokens
    per second; or ``not_measured`` with the reason. ``kernels`` names those of the layers, in
    order, for prompts and for single tokens.
    """
    from torch._dynamo.exc import TorchDynamoException

    values: dict[str, dict[str, Any]] = {name: {"settings": []} for name in models}
    prompts = tokens = 0.0  # seconds of a round of all models: per prompt, and of the new tokens
    for setting in _settings(request):
        # Prompts take in proportion to their number, new tokens at least as long as fewer.
        expected = (setting.batch * prompts + tokens) * (1 + FEWEST_ROUNDS)
        if expected > request.patience:
            _note(values, setting, f"would take about {expected:.0f} s")
            continue
        try:
            rows, seconds = _measured(models, request, setting, values)
        except RuntimeError as error:
            known = isinstance(error, TorchDynamoException | torch.OutOfMemoryError)
            if not known and setting.mode != GRAPHS:  # not everything can be recorded
                raise
            first_lines = " ".join(str(error).splitlines()[:2])
            _note(values, setting, f"{type(error).__name__}: {first_lines}")
            continue
        if setting.mode == EAGER:
            prompts, tokens = seconds[0] / setting.batch, seconds[1]
        for name, row in rows.items():
            values[name]["settings"].append(row)
    return values


def _settings(request: ThroughputRequest) -> Iterator[Setting]:
    for batch in request.batches:
        yield Setting(batch=batch)
        if batch in request.recorded:
            yield Setting(batch=batch, mode=GRAPHS)
        if batch in request.compiled:
            yield Setting(batch=batch, mode=COMPILED)


def _note(values: Mapping[str, Any], setting: Setting, reason: str) -> None:
    row = {"batch": setting.batch, "mode": setting.mode, "not_measured": reason}
    for found in values.values():
        found["settings"].append(row)


def _measured(
    models: Mapping[str, Any],
    request: ThroughputRequest,
    setting: Setting,
    values: Mapping[str, dict[str, Any]],
) -> tuple[dict[str, dict[str, Any]], tuple[float, float]]:
    """Return a row for each model, and the seconds of one round of all of them, in its parts."""
    if setting.mode == COMPILED:
        torch.compiler.reset()  # one graph for each model, not one for every batch so far
    generations, peaks = {}, {}
    for name, model in models.items():
        generations[name] = Generation(model, request, setting)
        if setting.mode == EAGER:
            values[name]["kernels"] = generations[name].kernels()  # warm-up: libraries start
        else:
            generations[name].prepare()
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    begun = time.monotonic()
    while not finished(
        rounds,
        time.monotonic() - begun,
        max_rounds=request.max_rounds,
        max_seconds=request.seconds,
    ):
        # Back and forth, so that a machine that slows down favours none of them.
        order = list(models) if len(rounds[next(iter(models))]) % 2 == 0 else list(models)[::-1]
        for name in order:
            peak = None
            if name not in peaks:
                release_freed_memory()  # else a model reuses what the one before has freed
                peak = PeakMemory(models[name].device.type)
            rounds[name].append(generations[name].seconds())
            if peak is not None:
                # Weights are memory-mapped from files, which the peak does not include.
                peaks[name] = weight_bytes(models[name]) + peak.bytes()
    last = [each[-1] for each in rounds.values()]
    seconds = (sum(each[0] for each in last), sum(each[1] for each in last))
    sizes = (setting.batch * request.prompt, setting.batch * request.new_tokens)
    where = {"batch": setting.batch, "mode": setting.mode}
    return {
        name: {**where, **speeds(each, sizes), "peak_bytes": peaks[name]}
        for name, each in rounds.items()
    }, seconds


class Generation:
    """A model that generates from random prompts at one setting.

    Prompts pass the model as it is. What is recorded or compiled is the step for one token, over a
    cache of a fixed size; compiled as transformers does it, by `get_compiled_call`.
    """

    def __init__(self, model: Any, request: ThroughputRequest, setting: Setting) -> None:
        """Make the prompts; nothing is computed yet."""
        from transformers import CompileConfig, StaticCache

        generator = torch.Generator().manual_seed(0)
        size = (setting.batch, request.prompt)
        ids = torch.randint(0, model.config.vocab_size, size, generator=generator)
        self._ids = ids.to(model.device)
        self._model, self._step, self._cache = model, model, None
        self._new_tokens, self._mode = request.new_tokens, setting.mode
        if setting.mode != EAGER:
            length = request.prompt + max(request.new_tokens, WARM_UP)
            self._cache = StaticCache(config=model.config, max_cache_len=length)
        if setting.mode == COMPILED:
            # A graph that breaks, or is compiled again for another shape, is not what is timed.
            how = CompileConfig(fullgraph=True, dynamic=False)
            self._step = model.get_compiled_call(how)

    def prepare(self) -> None:
        """Record or compile the step for one token."""
        if self._mode == GRAPHS:
            self._step = _Recorded(self._model, *self._prefill())
        else:
            self.seconds()

    def seconds(self) -> tuple[float, float]:
        """Return the seconds of the prompts, and those of all new tokens."""
        begun = self._now()
        cache, token = self._prefill()
        prefilled = self._now()
        for _ in range(self._new_tokens):
            token = self._next(cache, token)
        return prefilled - begun, self._now() - prefilled

    def tokens(self) -> Tensor:
        """Return the new tokens after the first one, (batch, new_tokens)."""
        cache, token = self._prefill()
        found = []
        for _ in range(self._new_tokens):
            token = self._next(cache, token)
            found.append(token)
        return torch.cat(found, dim=1)

    def kernels(self) -> dict[str, list[str]]:
        """Return the kernel of every layer's attention, for prompts and for one token."""
        with AttentionKernels() as prompts:
            cache, token = self._prefill()
        with AttentionKernels() as single:
            self._next(cache, token)
        return {"prefill": prompts.names, "decode": single.names}

    def _prefill(self) -> tuple[Any, Tensor]:
        """Return the cache after the prompts, and the first token after each."""
        if self._cache is not None:
            self._cache.reset()
        output = self._model(
            self._ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return output.past_key_values, output.logits[:, -1:].argmax(-1)

    def _next(self, cache: Any, token: Tensor) -> Tensor:
        output = self._step(token, past_key_values=cache, use_cache=True)
        found: Tensor = output.logits[:, -1:].argmax(-1)
        return found

    def _now(self) -> float:
        if self._ids.device.type == "cuda":
            torch.cuda.synchronize(self._ids.device)
        return time.perf_counter()


class _Recorded:
    """The step for one token of a model as a CUDA graph: recorded once, launched as a whole.

    The cache is at another position afterwards; a prompt resets it.
    """

    def __init__(self, model: Any, cache: Any, token: Tensor) -> None:
        """Record a step; ``token``, (batch, 1), is one to do it with."""
        self._token = token.clone()
        # Recording needs a stream of its own.
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                model(self._token, past_key_values=cache, use_cache=True)
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = model(self._token, past_key_values=cache, use_cache=True)

    def __call__(self, token: Tensor, **_: Any) -> Any:
        """Return the output for a token; the next call overwrites it."""
        self._token.copy_(token)
        self._graph.replay()
        return self._output


def weight_bytes(model: Any) -> int:
    """Return the bytes of a model's distinct weights and buffers."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())
