"""Some runs of ``benchmarks/chaos.py``: a loss in the middle, and the bytes of a calm run.

Nightly: ``test_on_nodes.py`` has the same losses of a smaller model, with the same demands.
"""

import pytest
from chaos import (
    BUCKET,
    NODES,
    Disturbance,
    Harness,
    store_server,
    verdict,
    write_model,
)
from spot_cluster import SpotCluster

pytestmark = [pytest.mark.ray, pytest.mark.nightly]
LOSSES = [
    Disturbance(kind="node", phase="calibrate", event=5, store="local", method="slicegpt"),
    Disturbance(kind="freeze", phase="compress", event=2, store="local", method="slicegpt"),
    Disturbance(kind="drain", phase="calibrate", event=2, store="local", method="slicegpt"),
    Disturbance(kind="driver", phase="evaluate", event=1, store="s3", method="slicegpt"),
]


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chaos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        patch.setenv("AWS_ACCESS_KEY_ID", "chaos")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "chaos")
        with store_server(folder) as query:
            cluster = SpotCluster(NODES)
            try:
                yield Harness(cluster, write_model(folder), folder), folder, query
            finally:
                cluster.close()


@pytest.fixture(scope="module")
def calm(harness):
    run, folder, _ = harness
    course = run.run("slicegpt", str(folder / "calm"))
    assert not course.failure, run.log
    return course


def test_a_node_that_is_lost_while_two_shards_pass_side_by_side_costs_no_bit(harness):
    run, folder, _ = harness
    in_shards = run.with_recipe({"calibration.shards": 2})
    calm = in_shards.run("slicegpt", str(folder / "calm-shards"))
    assert not calm.failure, in_shards.log
    assert calm.commits["shard-00001-layer-00000"] == 1
    loss = Disturbance(kind="node", phase="calibrate", event=5, store="local", method="slicegpt")
    course = in_shards.disturbed(loss, str(folder / "node-shards"))
    assert verdict(course, calm) == "", in_shards.log


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.kind} in {loss.phase}")
def test_a_run_that_loses_something_ends_with_the_bytes_of_one_that_does_not(harness, calm, loss):
    run, folder, query = harness
    name = f"{loss.kind}-{loss.phase}".replace(" ", "-")
    out = f"s3://{BUCKET}/{name}{query}" if loss.store == "s3" else str(folder / name)
    course = run.disturbed(loss, out)
    assert verdict(course, calm) == "", run.log
