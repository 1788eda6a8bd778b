"""A run whose model is on the Hub and whose directory is in a bucket: nothing lies in between."""

import dataclasses
import json

import pytest
import torch

from actors.storage import hub as storage
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.retries import ATTEMPTS
from actors.storage.sources import hub_place, resolve_model
from orchestrator.backend.local import LocalExecutor
from orchestrator.forecast.forecast import forecast_of
from orchestrator.forecast.pricing import Pricing
from orchestrator.phases.open_run import open_run
from orchestrator.remote.job_client import JobClient
from orchestrator.run import run_on
from orchestrator.rundir.layout import READY
from planners.errors import ConfigError, ModelError, StorageError
from tests.builders import prepared_run, save_model
from tests.hub import COMMIT, REPO, FakeHub, forget, used_in_process

TOKEN = "hf_planted0123456789abcdef"
URI = f"hf://{REPO}@{COMMIT}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), max_shard_size="30KB")


@pytest.fixture
def hub(model, tmp_path, monkeypatch):
    """A gated model on a Hub, and a process that has its token."""
    with FakeHub(model, token=TOKEN) as found:
        used_in_process(found, monkeypatch, tmp_path)
        storage.lend(TOKEN)
        yield found
    forget()


def test_a_run_from_the_hub_to_a_bucket_is_ready_and_reads_what_its_plan_counts(
    hub, model, s3, tmp_path, monkeypatch
):
    monkeypatch.setattr(storage, "SMALL_BYTES", 0)  # weights so small would be kept as headers
    out = s3("run")
    prepared = prepared_run(model, out, source=f"hf://{REPO}")
    planned = forecast_of(prepared, Pricing()).to_json()["download_bytes"]
    local = dataclasses.replace(prepared, model_uri=str(model))
    assert forecast_of(local, Pricing()).to_json()["download_bytes"] == 0
    hub.served.clear()
    open_run(prepared)
    report = run_on(prepared, LocalExecutor(), listener=lambda _: None)
    assert report["verdict"] == "READY"
    weights = [s for s in hub.served if s.name.startswith("model-") and s.start != 8 != s.size]
    assert planned == pytest.approx(sum(s.size for s in weights), rel=0.05)
    run = Directory(out)
    assert run.size(READY)
    everything = b"".join(run.read(name) for name in run.names())
    assert TOKEN.encode() not in everything + json.dumps(report).encode()
    assert not (tmp_path / "cache").exists()  # nothing lies on this disk


def test_a_layer_is_read_by_its_own_ranges_and_nothing_else(hub, model, monkeypatch):
    monkeypatch.setattr(storage, "SMALL_BYTES", 0)  # these weights would count as headers
    found, local = Checkpoint(URI), Checkpoint(str(model))
    hub.served.clear()
    layer = found.read_layer(1)
    assert all(torch.equal(layer[role], t) for role, t in local.read_layer(1).items())
    places = [p for n, p in local.locations.items() if ".layers.1." in n]
    wanted = {(p.file, p.entry.start, p.entry.size) for p in places}
    assert {(s.name, s.start, s.size) for s in hub.served} == wanted


def test_what_a_commit_says_of_itself_is_asked_for_once(hub):
    Checkpoint(URI)
    asked, served = len(hub.asked), len(hub.served)
    Checkpoint(URI).read_layer(0)
    headers = {s.name for s in hub.served[:served]}
    Checkpoint(URI)
    again = [s for s in hub.served[served:] if s.start == 0]
    assert again == []
    assert headers
    assert not [path for path in hub.asked[asked:] if path.startswith("/api/")]


def test_a_branch_that_moves_does_not_move_a_run(hub):
    before = resolve_model(REPO, copy=False)
    hub.newest = "f" * 40
    after = resolve_model(REPO, copy=False)
    assert (before.uri, after.uri) == (URI, f"hf://{REPO}@{'f' * 40}")
    Checkpoint(before.uri)
    assert hub.asked[-1].startswith(f"/{REPO}/resolve/{COMMIT}/")


def test_the_content_hash_takes_the_hubs_own_and_reads_no_weight(hub, model):
    found = Checkpoint(URI)
    served = len(hub.served)
    assert found.revision
    assert len(hub.served) == served
    name = next(n for n in hub.files if n.startswith("model-"))
    assert found.directory.stated_sha256(name) == Directory(str(model)).sha256(name)
    assert found.directory.stated_sha256("config.json") == ""
    assert Directory(str(model)).stated_sha256(name) == ""


@pytest.mark.parametrize("failures", [[503], [403], [500, 429]])
def test_a_cdn_that_fails_for_a_moment_is_asked_again(hub, failures):
    hub.failures += failures
    assert Checkpoint(URI).shape.num_layers == 3
    assert not hub.failures


def test_a_hub_that_counts_requests_is_waited_for(hub):
    hub.limits = 1
    assert Checkpoint(URI).shape.num_layers == 3


def test_a_cdn_that_stays_away_is_named_without_its_signature(hub, monkeypatch):
    monkeypatch.setattr("actors.storage.retries.FIRST_DELAY_SECONDS", 0.001)
    Directory(URI).size("config.json")
    hub.failures += [503] * ATTEMPTS
    with pytest.raises(
        StorageError, match=r"config\.json: 127\.0\.0\.1 responded with HTTP 503"
    ) as refused:
        Directory(URI).read("config.json")
    assert "signed" not in str(refused.value)


@pytest.mark.parametrize("token", ["", "hf_of_somebody_else"])
def test_a_gated_model_is_refused_at_the_door_with_the_way_out(hub, token):
    forget()
    storage.lend(token)
    with pytest.raises(ModelError, match="restricted to users who were granted it") as refused:
        resolve_model(REPO, copy=False)
    assert f"https://huggingface.co/{REPO}" in refused.value.hint
    assert "hf auth login" in refused.value.hint
    assert hub.served == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("someone/nothing", "neither a local directory nor a repository"),
     (f"{REPO}@v9", "no revision 'v9'"),
     ("hf://someone", "no such directory or alias")],
)  # fmt: skip
@pytest.mark.usefixtures("hub")
def test_what_is_not_on_the_hub_is_refused(name, words):
    with pytest.raises(ModelError, match=words):
        resolve_model(name, copy=False)


@pytest.mark.usefixtures("hub")
def test_a_file_on_the_hub_is_not_written(tmp_path):
    with pytest.raises(StorageError, match="read-only"):
        Directory(URI).write("config.json", b"{}")
    with pytest.raises(StorageError, match="hf://org/name@COMMIT"):
        Directory("hf://org/name")
    assert not list(tmp_path.glob("**/config.json"))


def test_a_name_is_told_apart_without_asking_anybody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert hub_place("llama-2-70b@v1") == ("llama-2-70b", "meta-llama/Llama-2-70b-hf", "v1")
    assert hub_place("org/name") == ("name", "org/name", "")
    assert hub_place("hf://org/here") == ("here", "org/here", "")
    for name in ("org/here", "./org/name", "s3://bucket/model", "tiny", "nobody"):
        assert hub_place(name) is None


def test_the_token_does_not_go_over_a_network_in_clear(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    with pytest.raises(ConfigError, match="over the network unencrypted"):
        JobClient("http://192.0.2.1:8265").lend(TOKEN)
