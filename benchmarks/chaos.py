"""Whatever is lost and whenever: every run ends READY with the bytes of an undisturbed one.

Claim: of at least 60 runs that each lose something (a worker, a node with its workers, a frozen
node, a node that was announced, two nodes at once, all workers, the driver) in each phase, with the
run directory on a local disk and on an S3-speaking server, every final checkpoint is byte-identical
to the undisturbed one, and no unit that has a record is lost or done twice.

Method: real raylets on this machine, a head without work and four nodes of one core; three workers.
The driver is a process of its own whose events are followed; the loss happens at an event of a
phase, drawn with a seed. A lost node is replaced at once, as spare capacity does. Where the driver
ends without READY the same command is run again.

    .venv/bin/python benchmarks/chaos.py [--quick] [--seed N] [--only KIND]
"""

import argparse
import itertools
import multiprocessing
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from result_file import Goal, Result, load_average, report, table
from spot_cluster import SpotCluster

KINDS = ("worker", "node", "freeze", "drain", "two nodes", "all workers", "driver")
PHASES = ("calibrate", "compress", "stitch", "evaluate", "verify")
STORES = ("local", "s3")
METHODS = {"slicegpt": {}, "modegpt": {"options.grid": "0.5"}}
NODES, WORKERS = 4, 3
NOTICE_SECONDS = 4
LATEST = 6  # a loss comes at one of the first so many events of its phase
MAX_COMMANDS = 6
HUNG_SECONDS = 240
BUCKET = "chaos"
PRELOAD = ["torch", "ray", "orchestrator.run", "orchestrator.recipe.reading"]
METHOD = (__doc__ or "").partition("Method: ")[2].partition("\n\n")[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Disturbance:
    """What is lost, in which phase, at which of its events, and where the run lies."""

    kind: str
    phase: str
    event: int
    store: str
    method: str


@dataclass(slots=True, kw_only=True)
class Course:
    """How a run went.

    Attributes:
        seconds: from the first command to READY.
        commands: how often the command was run.
        commits: unit -> how often it was recorded.
        hashes: file of the result -> sha256.
        fired: the loss happened.
        failure: what kept it from READY; empty where nothing did.
    """

    seconds: float = 0.0
    commands: int = 0
    commits: Counter[str] = field(default_factory=Counter)
    hashes: dict[str, str] = field(default_factory=dict)
    fired: bool = False
    failure: str = ""


def schedule(seed: int) -> list[Disturbance]:
    """Return every kind of loss in every phase on every store; method and moment are drawn."""
    rng = random.Random(seed)
    found = [
        Disturbance(
            kind=kind,
            phase=phase,
            store=store,
            method=rng.choice(list(METHODS)),
            event=rng.randrange(LATEST) if phase in ("calibrate", "compress", "evaluate") else 0,
        )
        for kind, phase, store in itertools.product(KINDS, PHASES, STORES)
    ]
    rng.shuffle(found)
    return found


def write_model(folder: Path, *, calibration: int = 48) -> dict[str, Any]:
    """Write a random model and so many sequences; return the recipe that all runs share."""
    import torch
    from bare import VOCABULARY, llama, write_random_model
    from safetensors.torch import save_file

    config = llama(hidden=128, intermediate=256, num_layers=8, num_heads=4)
    write_random_model(folder / "model", config)
    generator = torch.Generator().manual_seed(0)
    recipe: dict[str, Any] = {
        "model": str(folder / "model"),
        "device": "cpu",
        "workers": WORKERS,
        "keep_fraction": 0.8,
        "calibration.microbatch_tokens": 256,
    }
    for split, count in (("calibration", calibration), ("evaluation", 16)):
        ids = torch.randint(0, VOCABULARY, (count, 128), generator=generator)
        save_file({"input_ids": ids}, folder / f"{split}.safetensors")
        recipe[f"{split}.source"] = f"tokens:{folder / split}.safetensors"
    return recipe


def drive(
    recipe: Mapping[str, Any], environment: Mapping[str, str], events: Connection, log: str
) -> None:
    """Do a run in a process of its own; tell what happens and what is recorded."""
    os.environ.update(environment)  # the server that forks has the one it was started with
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from orchestrator.prepare.prepare import prepare
    from orchestrator.recipe.reading import load_config
    from orchestrator.run import run
    from orchestrator.rundir.ledger import Ledger
    from planners.errors import CompressionError

    commit = Ledger.commit

    def counted(self: Ledger, unit: Any, *args: Any, **kwargs: Any) -> Any:
        record = commit(self, unit, *args, **kwargs)
        events.send(("commit", unit.name, ""))
        return record

    Ledger.commit = counted  # type: ignore[method-assign]
    try:
        run(
            prepare(load_config(None, recipe)),
            listener=lambda event: events.send((event["kind"], event["unit"], event["worker"])),
        )
    except CompressionError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        sys.exit(error.exit_code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """An event of a driver: its kind, unit and worker, and the driver's process."""

    kind: str
    unit: str
    worker: str
    driver: int


Disturb = Callable[[Heard], bool]


class Harness:
    """Runs on one cluster, each with its loss."""

    def __init__(self, cluster: SpotCluster, recipe: Mapping[str, Any], folder: Path) -> None:
        self._cluster, self._recipe, self._folder = cluster, recipe, folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._number = 0

    def with_recipe(self, more: Mapping[str, Any]) -> "Harness":
        """Return a harness of the same cluster and model whose runs have more in their recipe."""
        folder = self._folder / "-".join(f"{key}-{value}" for key, value in more.items())
        folder.mkdir()
        return Harness(self._cluster, {**self._recipe, **more}, folder)

    @property
    def log(self) -> str:
        """What the commands of the last run printed."""
        path = self._folder / f"run-{self._number:03d}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def run(self, method: str, out: str, disturb: Disturb | None = None) -> Course:
        """Run the command until READY; ``disturb`` hears each event until it says that it acted."""
        self._number += 1
        own = {"method": method, "out": out, "address": self._cluster.address}
        recipe = {**self._recipe, **METHODS[method], **own}
        course, begun = Course(), time.monotonic()
        while course.commands < MAX_COMMANDS:
            course.commands += 1
            code = self._command(recipe, course, disturb, begun)
            if code == 0 or course.failure:
                break
        course.seconds = time.monotonic() - begun
        course.failure = course.failure or ("" if code == 0 else f"exit {code}")
        if not course.failure:
            course.hashes = _hashes(out)
        self._cluster.refill()
        return course

    def _command(
        self,
        recipe: Mapping[str, Any],
        course: Course,
        disturb: Disturb | None,
        begun: float,
    ) -> int:
        ours, theirs = self._context.Pipe(duplex=False)
        log = str(self._folder / f"run-{self._number:03d}.log")
        driver = self._context.Process(target=drive, args=(recipe, dict(os.environ), theirs, log))
        driver.start()
        theirs.close()
        while driver.is_alive() or ours.poll():
            if time.monotonic() - begun > HUNG_SECONDS:
                course.failure = f"no end after {HUNG_SECONDS} s"
                driver.kill()
                break
            if not ours.poll(0.1):
                continue
            try:
                kind, unit, worker = ours.recv()
            except EOFError:
                break
            if kind == "commit":
                course.commits[unit] += 1
            elif disturb is not None and not course.fired:
                heard = Heard(kind=kind, unit=unit, worker=worker, driver=int(driver.pid or 0))
                course.fired = disturb(heard)
        driver.join()
        return int(driver.exitcode or 0)

    def disturbed(self, what: Disturbance, out: str) -> Course:
        """Run with one loss."""
        phase, count = "", 0

        def disturb(heard: Heard) -> bool:
            nonlocal phase, count
            if heard.kind != "phase begins":
                count += 1
            elif heard.unit != "run":
                phase, count = heard.unit, 0
            return (
                phase == what.phase and count >= what.event and self.lose(what.kind, heard.driver)
            )

        return self.run(what.method, out, disturb)

    def lose(self, kind: str, driver: int) -> bool:
        """Lose something, if it is there by now."""
        cluster = self._cluster
        if kind == "driver":
            os.kill(driver, signal.SIGKILL)
            return True
        nodes = cluster.working()
        if not nodes or (kind == "two nodes" and len(nodes) < 2):  # noqa: PLR2004 two
            return kind == "two nodes" and bool(nodes) and self.lose("node", driver)
        if kind == "worker":
            cluster.kill_worker(nodes[0])
        elif kind == "all workers":
            for node in nodes:
                cluster.kill_worker(node)
        elif kind == "drain":
            cluster.add()
            cluster.drain(nodes[0], seconds=NOTICE_SECONDS)
            time.sleep(NOTICE_SECONDS)
            cluster.kill(nodes[0])
        else:
            lose = cluster.freeze if kind == "freeze" else cluster.kill
            for node in nodes[: 2 if kind == "two nodes" else 1]:
                cluster.add()
                lose(node)
        return True


def _hashes(out: str) -> dict[str, str]:
    from actors.storage.files import Directory

    run = Directory(out)
    return {name: run.sha256(name) for name in run.names("model")}


@contextmanager
def store_server(folder: Path) -> Iterator[str]:
    """Start an S3-speaking server on loopback; give the end of a URI that names it."""
    from pyarrow import fs

    os.environ.update(AWS_ACCESS_KEY_ID="chaos", AWS_SECRET_ACCESS_KEY="chaos")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (folder / "store.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        address = f"127.0.0.1:{port}"
        store = fs.S3FileSystem(
            scheme="http", endpoint_override=address, region="us-east-1",
            allow_bucket_creation=True,
        )  # fmt: skip
        for _ in range(100):
            try:
                store.create_dir(BUCKET)
                break
            except OSError:
                time.sleep(0.2)
        yield f"?scheme=http&endpoint_override={address}&region=us-east-1"
    finally:
        server.kill()
        server.wait()


def verdict(course: Course, calm: Course) -> str:
    """Return what is wrong with a disturbed run; empty where nothing is."""
    if course.failure:
        return course.failure
    if course.hashes != calm.hashes:
        differ = {n for n in course.hashes.keys() | calm.hashes.keys()
                  if course.hashes.get(n) != calm.hashes.get(n)}  # fmt: skip
        return f"other bytes: {', '.join(sorted(differ))}"
    twice = sorted(unit for unit, count in course.commits.items() if count > calm.commits[unit])
    missing = sorted(calm.commits.keys() - course.commits.keys())
    if twice or missing:
        return f"recorded twice: {twice[:3]}; never: {missing[:3]}"
    return "" if course.fired else "nothing was lost"


def main() -> None:
    """Do all runs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="four runs; writes nothing")
    parser.add_argument("--seed", type=int, default=0, help="of the schedule [%(default)s]")
    parser.add_argument("--only", choices=KINDS, help="one kind of loss; writes nothing")
    given = parser.parse_args()
    load, begun = load_average(), time.monotonic()
    plans = [p for p in schedule(given.seed) if given.only in (None, p.kind)]
    plans = plans[:4] if given.quick else plans
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
        with store_server(folder) as query:
            recipe = write_model(folder)
            cluster = SpotCluster(NODES)
            try:
                found = _all(Harness(cluster, recipe, folder), plans, folder, query)
            finally:
                cluster.close()
    calm, courses = found
    _report(plans, calm, courses, load=load, minutes=(time.monotonic() - begun) / 60,
            seed=given.seed, keep=not (given.quick or given.only))  # fmt: skip


Calm = dict[tuple[str, str], list[Course]]


def _all(
    harness: Harness, plans: Sequence[Disturbance], folder: Path, query: str
) -> tuple[Calm, list[Course]]:
    def out(store: str, name: str) -> str:
        return f"s3://{BUCKET}/{name}{query}" if store == "s3" else str(folder / name)

    calm: Calm = {}
    for method, store in itertools.product(METHODS, STORES):
        runs = [harness.run(method, out(store, f"calm-{method}-{i}")) for i in range(1)]
        calm[method, store] = runs
        print(f"calm {method} {store}: {[round(r.seconds, 1) for r in runs]} {runs[0].failure}",
              flush=True)  # fmt: skip
    courses = []
    for number, what in enumerate(plans):
        course = harness.disturbed(what, out(what.store, f"run-{number:03d}"))
        courses.append(course)
        wrong = verdict(course, calm[what.method, what.store][0])
        print(f"{number + 1}/{len(plans)} {what.kind}, {what.phase}, event {what.event}, "
              f"{what.store}, {what.method}: {course.seconds:.1f} s, {course.commands} commands: "
              f"{wrong or 'same bytes'}", flush=True)  # fmt: skip
        if course.failure:
            print(harness.log[-2000:], flush=True)
    return calm, courses


def _report(
    plans: Sequence[Disturbance], calm: Calm, courses: Sequence[Course], **facts: Any
) -> None:
    usual = {key: statistics.median(c.seconds for c in runs) for key, runs in calm.items()}
    wrong = [
        verdict(course, calm[what.method, what.store][0])
        for what, course in zip(plans, courses, strict=True)
    ]
    rows = []
    for kind in KINDS:
        own = [(p, c, w) for p, c, w in zip(plans, courses, wrong, strict=True) if p.kind == kind]
        if own:
            lost = [c.seconds - usual[p.method, p.store] for p, c, _ in own]
            rows.append((
                kind, len(own), sum(not w for _, _, w in own), f"{statistics.median(lost):.1f}",
                f"{max(lost):.1f}", sum(c.commands - 1 for _, c, _ in own),
            ))  # fmt: skip
    same = {store: {m: calm[m, store][0].hashes for m in METHODS} for store in STORES}
    columns = ("lost", "runs", "same bytes", "seconds lost, median", "most", "commands run again")
    report(
        Result(
            claim="chaos",
            method=METHOD,
            configuration={
                "model": "random Llama, hidden 128, 8 layers; float32",
                "tokens": "24 microbatches of 2 x 128 of calibration, 8 of evaluation",
                "cluster": f"a head and {NODES} nodes of one core, {WORKERS} workers",
                "phases": ", ".join(PHASES),
                "stores": "local disk; moto on loopback",
                "seed": facts["seed"],
            },
            tables={"By what is lost:": table(columns, rows)},
            goals=[
                Goal(
                    text="runs that end READY, byte-identical, no recorded unit lost or done twice",
                    measured=f"{sum(not w for w in wrong)} of {len(wrong)}",
                    met=not any(wrong),
                ),
                Goal(
                    text="bytes on the object store are those on the local disk",
                    measured=str(same["local"] == same["s3"]),
                    met=same["local"] == same["s3"],
                ),
            ],
            notes=[
                f"An undisturbed run takes {min(usual.values()):.1f} to "
                f"{max(usual.values()):.1f} s; all runs together took {facts['minutes']:.0f} min.",
                *(
                    f"{p.kind}, {p.phase}, event {p.event}, {p.store}, {p.method}: {w}"
                    for p, w in zip(plans, wrong, strict=True)
                    if w
                ),
            ],
            load=facts["load"],
        ),
        keep=facts["keep"],
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # no raylet outlives it
    os.environ["RAY_AUTH_MODE"] = "disabled"  # this cluster is on loopback and gone in an hour
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    main()
