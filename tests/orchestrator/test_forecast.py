"""What a plan says before anything starts: time, money, what does not fit, and who is asked."""

import io
import json
from functools import cache

import pytest
from rich.console import Console

from orchestrator.backend.ray_cluster import ClusterFacts
from orchestrator.cli.consent import require_consent
from orchestrator.cli.plan import show
from orchestrator.forecast import clocks
from orchestrator.forecast.forecast import forecast, forecast_of
from orchestrator.forecast.pricing import Pricing, parse_cluster
from orchestrator.recipe.reading import load_config
from orchestrator.report.expected import expectations
from planners.errors import ConfigError, PlanError
from tests.builders import prepared_run, run_local, save_model

BIG = {"model": "llama-2-70b"}
SHORT = {"calibration.sequences": 16, "evaluation.sequences": 16}


def facts(**changes):
    given = {"address": "auto", "num_nodes": 1, "cpus": 8.0, "gpus": 0.0, "dashboard": ""}
    return ClusterFacts(**{**given, **changes})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("forecast") / "model")


@pytest.fixture(autouse=True)
def measurements(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "compress-cluster" / "measured"


PAID_SPOT = Pricing(price_per_hour=1.10, preemptions_per_hour=0.05)
UNKNOWN = "TPUv5"  # how fast it is nobody knows, so nothing is simulated: only its memory counts


@cache
def of_70b(cluster="8xA100-80GB", terms=Pricing(), **recipe):  # noqa: B008 - it is frozen
    config = load_config(None, {**BIG, **SHORT, **recipe})
    # A few sequences: what is simulated is the schedule, not how long it can get.
    return forecast(config, parse_cluster(cluster), terms)


def test_seventy_billion_on_eight_devices():
    found = of_70b(terms=PAID_SPOT)
    seconds, money = found.outlook.seconds, found.outlook.money
    assert 0 < seconds.p10 <= seconds.p50 <= seconds.p90
    assert money.p50 == pytest.approx(seconds.p50 / 3600 * 8 * 1.10)
    assert "not measured" in found.clock.source
    said = found.to_json()
    assert json.loads(json.dumps(said)) == said
    # 8 stages hand 2 x 8192 numbers a token on: the edges, three passes, two bytes each.
    tokens = 3 * 16 * 2048
    assert said["transfer_bytes"] == 7 * tokens * 8192 * 2


def test_losses_make_a_run_longer():
    calm = of_70b().outlook
    rough = of_70b(terms=Pricing(preemptions_per_hour=6.0)).outlook
    assert rough.losses.p50 > 0
    assert rough.seconds.p50 > calm.seconds.p50


def test_an_unknown_device_has_a_plan_and_no_time():
    found = of_70b(f"8x{UNKNOWN}-95GB")
    assert found.outlook is None
    assert found.plan.worker_bytes > 0
    assert "seconds" not in found.to_json()


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("cluster", ["8xA100-80GB", f"8x{UNKNOWN}-95GB"])
def test_the_screen_keeps_numbers_whole(columns, cluster):
    console = Console(width=columns, record=True, file=io.StringIO())
    found = of_70b(cluster, terms=PAID_SPOT)
    show(console, found, title="llama-2-70b", out="not started")
    text = console.export_text()
    assert all(len(line) <= columns for line in text.splitlines())
    peak = [line for line in text.splitlines() if {"GB", "MB"} <= set(line.split())]
    assert peak, text
    assert "…" not in text


def test_what_does_not_fit_names_three_ways_and_each_of_them_fits():
    with pytest.raises(PlanError, match=r"[\d,]+ bytes too small for one layer") as caught:
        of_70b(f"8x{UNKNOWN}-11GB", method="svdllm")
    ways = caught.value.hint.partition(": ")[2].split("; ")
    assert 2 <= len(ways) <= 3
    assert "--worker-gib" in ways[-1]
    for way in ways[:-1]:
        words = way.partition(":")[0].split()
        pairs = dict(zip(words[::2], words[1::2], strict=True))
        recipe = {"method": pairs.get("--method", "svdllm")}
        if "--microbatch-tokens" in pairs:
            recipe["calibration.microbatch_tokens"] = int(pairs["--microbatch-tokens"])
        if "--option" in pairs:
            key, value = pairs["--option"].split("=")
            recipe[f"options.{key}"] = value
        assert of_70b(f"8x{UNKNOWN}-11GB", **recipe).plan.waves
    # As much memory as it asks for is enough, and it asks for no more than it says.
    gib = float(ways[-1].split()[1])
    assert of_70b(f"8x{UNKNOWN}-20GB", method="svdllm").plan.waves if gib < 18 else True


def test_a_smaller_microbatch_is_the_first_way_where_it_is_enough():
    recipe = {"calibration.microbatch_tokens": 2**18, "calibration.sequences": 128}
    with pytest.raises(PlanError) as caught:
        of_70b(f"8x{UNKNOWN}-40GB", **recipe)
    first = caught.value.hint.partition(": ")[2].split("; ")[0]
    assert first.startswith("--microbatch-tokens ")
    recipe["calibration.microbatch_tokens"] = int(first.split()[1].rstrip(":"))
    assert of_70b(f"8x{UNKNOWN}-40GB", **recipe).plan.waves


def test_a_local_cluster_costs_nothing(model, tmp_path):
    found = forecast_of(prepared_run(model, tmp_path / "out"), Pricing(price_per_hour=1.0))
    require_consent(found, facts(address="local", gpus=8.0), yes=False, ask=None)


@pytest.mark.parametrize("paid", [{"gpus": 1.0}, {"spot": True}, {}])
def test_a_cluster_that_may_cost_money_is_used_only_with_consent(model, tmp_path, paid):
    terms = Pricing() if paid else Pricing(price_per_hour=1.0)
    found = forecast_of(prepared_run(model, tmp_path / "out"), terms)
    where = facts(**paid)
    with pytest.raises(ConfigError, match="may cost money") as caught:
        require_consent(found, where, yes=False, ask=None)
    assert "--yes" in caught.value.hint
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="nothing was started"):
        require_consent(found, where, yes=False, ask=lambda _: False)
    asked = []
    require_consent(found, where, yes=False, ask=lambda question: asked.append(question) or True)
    assert len(asked) == 1
    require_consent(found, where, yes=True, ask=None)


def test_a_cluster_without_price_or_devices_is_not_asked_about(model, tmp_path):
    found = forecast_of(prepared_run(model, tmp_path / "out"), Pricing())
    require_consent(found, facts(), yes=False, ask=None)


@pytest.mark.slow
def test_a_measurement_is_kept_and_used_and_says_what_it_is_of(measurements, model, tmp_path):
    prepared = prepared_run(model, tmp_path / "out", method="modegpt", keep_fraction=0.8)
    assert "not measured" in forecast_of(prepared, Pricing()).clock.source
    found = forecast_of(prepared, Pricing(measure=True))
    assert found.clock.source.startswith("measured on ")
    kinds = {"load", "calibrate", "evaluate", "evaluate_compressed", "statistics", "damage",
             "layer", "embedding", "head", "verify", "throughput", "stitch",
             "load_compressed"}  # fmt: skip
    assert set(found.clock.samples) == kinds
    assert all(sample.seconds > 0 for sample in found.clock.samples.values())
    assert len(list(measurements.iterdir())) == 1
    assert forecast_of(prepared, Pricing()).clock == found.clock
    how = {"method": "modegpt", "keep_fraction": 0.8, "threads": 2}
    other = prepared_run(model, tmp_path / "out", **how)
    assert "not measured" in forecast_of(other, Pricing()).clock.source


def test_a_torn_measurement_counts_as_none(model, tmp_path):
    prepared = prepared_run(model, tmp_path / "out")
    setting = clocks.ProfileKey(
        config=prepared.model_config, shape=prepared.plan.shape, method="slicegpt",
        options=prepared.options, target=prepared.config.target,
        data=forecast_of(prepared, Pricing()).job.data, device="cpu", threads=1,
    )  # fmt: skip
    path = clocks.kept_path(setting)
    path.parent.mkdir(parents=True)
    path.write_text('{"samples": {}')
    assert clocks.kept_clock(setting) is None


def test_measuring_needs_the_device_that_is_planned_for():
    with pytest.raises(ConfigError, match="this machine has no A100"):
        of_70b(terms=Pricing(measure=True))


def test_the_report_sets_the_plan_beside_what_was(model, tmp_path):
    prepared = prepared_run(model, tmp_path / "plan")
    report = run_local(model, tmp_path / "out")
    report["plan"]["forecast"] = forecast_of(prepared, Pricing()).to_json()
    rows = {row.what: row for row in expectations(report)}
    assert {"calibrate", "compress", "evaluate", "total"} <= set(rows)
    assert rows["total"].actual
    assert expectations({"plan": {}, "seconds": {"total": 1.0}}) == []
