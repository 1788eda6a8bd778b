"""Groups that lose a worker, a node or their driver: the bits stay, and little is done again."""

import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from actors.training.group import Alone
from actors.training.loop import train
from orchestrator.backend import preemption
from tests.nodes import Nodes, signal_all
from tests.trainings import Follower, begun, group, request, tiny_models, trained_bytes

pytestmark = [pytest.mark.ray, pytest.mark.nightly, pytest.mark.usefixtures("nodes")]
STEPS = 700  # half a minute


@pytest.fixture(scope="module")
def nodes():
    with Nodes(2) as found:
        yield found


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    train(request(models, out, steps=STEPS), Alone())
    return trained_bytes(out)


@pytest.fixture
def begin(models, tmp_path):
    """Return a function that starts a training, with what is noted of it."""
    deadline = time.monotonic() + 60
    while group() and time.monotonic() < deadline:
        time.sleep(0.2)
    asked, follower = request(models, tmp_path, steps=STEPS), Follower(tmp_path)
    return lambda: (begun(asked), follower)


def place_of(nodes, number):
    """Return the node of a worker of the group that trains."""
    _, wanted = sorted(group())[number]
    return next(node for node in nodes.nodes if node.node_id == wanted)


@pytest.mark.parametrize("number", [0, 1])
def test_a_killed_worker_costs_no_bit(begin, undisturbed, tmp_path, number):
    training, follower = begin()

    def kill():
        signal_all([sorted(group())[number][0]], signal.SIGKILL)

    follower.after(100, kill).until_done(training)
    print(follower.report())
    assert trained_bytes(tmp_path) == undisturbed
    assert follower.nothing_twice()
    assert follower.sizes == [2, 2]


def test_a_worker_killed_while_it_holds_half_of_the_layers_costs_no_bit(
    models, undisturbed, tmp_path
):
    asked, follower = (
        replace(request(models, tmp_path, steps=STEPS), divided=True),
        Follower(tmp_path),
    )
    training = begun(asked, fewest=2)

    def kill():
        signal_all([sorted(group())[1][0]], signal.SIGKILL)

    follower.after(100, kill).until_done(training)
    print(follower.report())
    assert trained_bytes(tmp_path) == undisturbed
    assert follower.nothing_twice()
    assert follower.sizes == [2, 2]


def test_a_drained_node_is_left_with_a_checkpoint(begin, nodes, undisturbed, tmp_path):
    training, follower = begin()
    left = []

    def drain():
        left.append(place_of(nodes, 0))
        preemption.drain(left[0].node_id, seconds=60, message="a test")

    follower.after(100, drain).until_done(training)
    print(follower.report())
    nodes.kill(left[0])
    nodes.refill()
    assert trained_bytes(tmp_path) == undisturbed
    assert follower.nothing_twice()
    assert follower.sizes == [2, 1]
    assert any(step % 20 for step in follower.seen if step != STEPS)  # saved as it left


def test_a_group_shrinks_with_its_nodes_and_grows_with_them(begin, nodes, undisturbed, tmp_path):
    training, follower = begin()
    follower.after(100, lambda: nodes.kill(place_of(nodes, 1)))
    follower.after(260, nodes.refill)
    follower.until_done(training)
    print(follower.report())
    assert trained_bytes(tmp_path) == undisturbed
    assert follower.nothing_twice()
    assert follower.sizes == [2, 1, 2]


DRIVER = """
import pickle, sys
import ray
from tests.trainings import begun

address, asked = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
begun(pickle.loads(bytes.fromhex(asked))).result()
"""


def test_a_training_outlives_its_driver(begin, models, nodes, undisturbed, tmp_path):
    asked, before = request(models, tmp_path, steps=STEPS), Follower(tmp_path)
    arguments = [nodes.address, pickle.dumps(asked).hex()]
    with subprocess.Popen([sys.executable, "-c", DRIVER, *arguments]) as driver:
        deadline = time.monotonic() + 120
        while max(before.seen, default=0) < 100 and time.monotonic() < deadline:
            assert driver.poll() is None
            before.look()
            time.sleep(0.1)
        driver.kill()
    training, follower = begin()
    follower.until_done(training)
    print(follower.report())
    assert trained_bytes(tmp_path) == undisturbed
    assert min(follower.seen) >= max(before.seen) - 20
    assert follower.nothing_twice()
