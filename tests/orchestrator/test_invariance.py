"""What may not change a result: workers, stages and waves no bit of it, the microbatch no digit."""

import pytest
import torch

from actors.storage.files import Directory
from actors.storage.records import read_records
from tests.builders import (
    LENGTH,
    VOCABULARY,
    compress_local,
    logits_of,
    perplexity,
    prepared_run,
    result_files,
    save_model,
    worker_gib,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), num_hidden_layers=4)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """A run whose one worker holds the whole model."""
    out = tmp_path_factory.mktemp("alone")
    compress_local(model, out)
    return out


def losses(out):
    return {name: perplexity(out, name) for name in ("dense", "compressed")}


def units_of(out):
    """Return name -> fingerprint of every unit but the activations between waves."""
    records = read_records(Directory(str(out)))
    return {n: r.fingerprint for n, r in records.items() if not n.startswith("boundary-")}


def shape_of(prepared):
    return [len(wave) for wave in prepared.plan.waves]


@pytest.mark.parametrize(
    ("workers", "num_layers", "stages_of_waves"),
    [
        (2, 4, [2]),
        (3, 4, [3]),
        (4, 1, [4]),
        (9, 4, [4]),
        (1, 1, [1, 1, 1, 1]),
        (1, 3, [1, 1]),
        (2, 1, [2, 2]),
        (3, 1, [2, 2]),
    ],
)
def test_workers_stages_and_waves_change_no_bit(
    model, alone, tmp_path, workers, num_layers, stages_of_waves
):
    how = {"workers": workers, "worker_gib": worker_gib(model, num_layers=num_layers)}
    assert shape_of(prepared_run(model, tmp_path, **how)) == stages_of_waves
    compress_local(model, tmp_path, **how)
    assert result_files(tmp_path) == result_files(alone)
    assert losses(tmp_path) == losses(alone)
    assert units_of(tmp_path) == units_of(alone)


@pytest.mark.parametrize("rotation", ["per_site", "shared"])
@pytest.mark.parametrize("microbatch_sequences", [1, 7, 20])
def test_the_microbatch_changes_less_than_a_millionth(
    model, tmp_path, rotation, microbatch_sequences
):
    ids = torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    found = []
    for size in (4, microbatch_sequences):
        out = tmp_path / str(size)
        compress_local(
            model, out, options={"rotation": rotation},
            calibration={"microbatch_tokens": size * LENGTH},
        )  # fmt: skip
        logits = logits_of(out / "model", ids, trust_remote_code=rotation == "per_site")
        found.append((losses(out), logits))
    (one, logits), (other, other_logits) = found
    assert other == pytest.approx(one, rel=1e-6)
    assert float((logits - other_logits).norm()) < 1e-5 * float(logits.norm())


def test_activations_between_waves_are_gone_when_they_have_served(model, tmp_path):
    compress_local(model, tmp_path, worker_gib=worker_gib(model, num_layers=1))
    assert [path.name for path in tmp_path.rglob("*-mb-*.safetensors")] == []
    assert len(list(tmp_path.rglob("boundary-*-mb-*.json"))) == 3 * 5  # there were some
