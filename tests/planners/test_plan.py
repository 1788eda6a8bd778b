"""Plans as data: written, read, compared and fingerprinted."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planners.batching import TokenBatching
from planners.canonical_json import fingerprint, to_json
from planners.memory.placement import load_of, place
from planners.model.cost import dense_model_form, dense_parameters, model_parameters
from planners.plan import RunPlan, run_plan_from_json
from tests.shapes import llama_shape
from tests.strategies import model_forms, shapes

SHAPE = llama_shape(
    family="llama", model_type="qwen2", num_layers=3, hidden=16, intermediate=24, num_heads=4,
    num_kv_heads=2, head_dim=4, vocab_size=50, tied=True, qkv_bias=True,
)  # fmt: skip
BATCHING = TokenBatching(sequences=2, sequence_length=4, microbatch_sequences=2, dtype="float32")
READER = """
import json, sys
from planners.canonical_json import fingerprint
from planners.plan import run_plan_from_json
print(fingerprint(run_plan_from_json(json.load(sys.stdin))))
assert "torch" not in sys.modules
"""


def plan_of(shape, **changes):
    form = dense_model_form(shape)
    layers = (replace(form.layers[0], ranks={"up_proj": 3, "q_proj": 2}), *form.layers[1:])
    load = load_of(shape, frozenset(), BATCHING)
    plan = RunPlan(
        shape=shape,
        form=replace(form, layers=layers),
        waves=place(shape, load, num_workers=2, worker_bytes=None),
        parameters_before=dense_parameters(shape),
        parameters_after=model_parameters(shape, form),
        bytes_before=1,
        bytes_after=1,
        calibration_tokens=1,
        calibration_flops=1,
        worker_bytes=1,
        disk_bytes=1,
    )
    return replace(plan, **changes)


@st.composite
def run_plans(draw):
    shape = draw(shapes())
    form = draw(model_forms(shape))
    load = load_of(shape, frozenset(), BATCHING)
    workers = draw(st.integers(1, 3))
    memory = sum(load.stage(1, tables=2).values()) + draw(st.integers(0, 3)) * load.layer
    return RunPlan(
        shape=shape,
        form=form,
        waves=place(shape, load, num_workers=workers, worker_bytes=memory),
        parameters_before=dense_parameters(shape),
        parameters_after=model_parameters(shape, form),
        bytes_before=4 * dense_parameters(shape),
        bytes_after=4 * model_parameters(shape, form),
        calibration_tokens=draw(st.integers(1, 10**9)),
        calibration_flops=draw(st.integers(1, 10**21)),
        worker_bytes=draw(st.integers(1, 10**12)),
        disk_bytes=draw(st.integers(1, 10**13)),
    )


@given(run_plans())
def test_a_plan_survives_json(plan):
    text = json.dumps(to_json(plan), allow_nan=False)
    again = run_plan_from_json(json.loads(text))
    assert again == plan
    assert fingerprint(again) == fingerprint(plan)


def test_a_fingerprint_is_the_same_in_another_process():
    plan = plan_of(SHAPE)
    found = subprocess.run(
        [sys.executable, "-c", READER],
        input=json.dumps(to_json(plan)),
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(filter(None, sys.path))},
    )
    assert found.stdout.strip() == fingerprint(plan)


@pytest.mark.parametrize(
    ("field", "value"),
    [("tied", False), ("hidden", 20), ("dtype", "bfloat16"), ("model_type", "llama")],
)
def test_a_fingerprint_differs_where_the_shape_does(field, value):
    assert fingerprint(plan_of(replace(SHAPE, **{field: value}))) != fingerprint(plan_of(SHAPE))


def test_a_fingerprint_differs_where_one_number_does():
    names = ("bytes_after", "calibration_tokens", "calibration_flops", "worker_bytes")
    plans = [plan_of(SHAPE), *(plan_of(SHAPE, **{name: 2}) for name in names)]
    assert len({fingerprint(plan) for plan in plans}) == len(plans)


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=6))
def test_a_fingerprint_does_not_depend_on_the_order_of_keys(data):
    assert fingerprint(data) == fingerprint(dict(reversed(data.items())))


@pytest.mark.parametrize("value", [{1, 2}, object(), float("nan"), float("inf")])
def test_what_has_no_stable_form_has_no_fingerprint(value):
    with pytest.raises((TypeError, ValueError)):
        fingerprint({"key": value})
