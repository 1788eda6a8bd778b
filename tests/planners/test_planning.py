"""What a plan says of memory and disk, against what is there."""

from dataclasses import replace

import pytest

from actors import methods
from orchestrator.recipe.method_options import resolve_options
from planners.batching import TokenBatching
from planners.memory.peaks import Shrinking
from planners.method import Target
from planners.model.cost import dense_model_form, layer_parameters
from planners.model.form import dense_form
from planners.planning import Workload, make_plan
from planners.units.kinds import unit_bytes
from tests.builders import compress_local, prepared_run, save_model
from tests.shapes import llama_shape

SHAPE = llama_shape(
    family="llama", model_type="llama", num_layers=4, hidden=256, intermediate=512, num_heads=8,
    num_kv_heads=8, head_dim=32, vocab_size=100, tied=False, dtype="bfloat16",
)  # fmt: skip
WORK = Workload(
    batching=TokenBatching(
        sequences=4, sequence_length=16, microbatch_sequences=2, dtype="bfloat16"
    ),
    num_workers=1, worker_bytes=2**40,
)  # fmt: skip
WIDE = {"hidden_size": 192, "intermediate_size": 512}  # so that headers are little beside tensors


def planned(method, work, *, shape=SHAPE):
    spec = methods.spec(method)
    options = resolve_options(spec, {"allocation": "uniform"} if method == "modegpt" else {})
    return make_plan(shape, spec, options, target=Target(keep_fraction=0.8), work=work)


def test_a_bfloat16_pass_is_planned_with_the_float32_model_that_is_evaluated():
    work = replace(WORK, on_host=False)  # nothing of other units beside the layers
    narrow = planned("slicegpt", work)
    exact = planned("slicegpt", replace(work, evaluation_dtype="float32"))
    layers = 4 * layer_parameters(SHAPE, dense_form(SHAPE))
    assert 2 * layers < narrow.worker_bytes < exact.worker_bytes
    assert exact.worker_bytes >= 4 * layers
    again = planned("slicegpt", replace(work, evaluation_dtype="bfloat16"))
    assert again.worker_bytes == narrow.worker_bytes


@pytest.mark.parametrize("method", ["modegpt", "svdllm"])
def test_sums_that_are_pages_of_files_take_no_memory_in_a_unit(method):
    one = replace(SHAPE, num_layers=1)  # whose pass takes less than its unit
    held, mapped = (planned(method, replace(WORK, mapped=m), shape=one) for m in (False, True))
    assert mapped.worker_bytes < held.worker_bytes


def test_outputs_that_wait_for_the_layers_behind_are_planned_one_a_level():
    spec, whole, peaks = methods.spec("modegpt"), dense_model_form(SHAPE), []
    tokens, width = WORK.batching.tokens, 2
    for damage in ("layer", "loss"):
        options = resolve_options(spec, {"allocation": "marginal", "damage": damage})
        step = Shrinking(
            shape=SHAPE, form=whole, spec=spec, options=options, tokens=(tokens, tokens),
            sequence_length=WORK.batching.sequence_length, dtype="bfloat16",
        )  # fmt: skip
        peaks.append(unit_bytes(step))
    ladders = spec.ladders(SHAPE, dense_form(SHAPE), options).values()
    outputs = 1 + sum(len(ladder.levels) for ladder in ladders)
    wait = outputs * tokens * SHAPE.hidden * width
    assert peaks[1] - peaks[0] == pytest.approx(wait, rel=0.1)


@pytest.mark.parametrize(
    ("method", "size"),
    [
        ("slicegpt", {"slice": 0.25}),
        ("modegpt", {"keep_fraction": 0.8, "options.allocation": "uniform"}),
        ("svdllm", {"keep_fraction": 0.8}),
    ],
)
def test_a_run_takes_the_disk_that_its_plan_says(method, size, tmp_path):
    model, out = save_model(tmp_path / "model", **WIDE), tmp_path / "run"
    expected = prepared_run(model, out, method=method, **size).plan.disk_bytes
    compress_local(model, out, method=method, **size)
    found = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    assert 0.98 * expected < found < 1.02 * expected


def test_other_units_are_read_and_written_beside_one_only_where_there_is_room():
    roomy = planned("slicegpt", WORK)
    read, written = dense_form(SHAPE), roomy.form.layers[0]
    assert roomy.in_flight_bytes >= 2 * sum(layer_parameters(SHAPE, f) for f in (read, written))
    needed = roomy.worker_bytes - 1
    tight = planned("slicegpt", replace(WORK, worker_bytes=needed))
    assert tight.in_flight_bytes == 0
    assert tight.worker_bytes <= needed
    on_a_device = planned("slicegpt", replace(WORK, on_host=False))
    assert on_a_device.in_flight_bytes > 0
    assert on_a_device.worker_bytes == tight.worker_bytes
