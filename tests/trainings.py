"""A tiny compressed model to train, and what can be seen of a training from outside."""

import time

from ray._private import state
from safetensors.torch import load_file

from actors.messages import TrainRequest
from actors.storage.files import Directory
from actors.storage.tokens import tokens_to_parquet
from actors.training.checkpoints import manifests, newest
from orchestrator.backend.executor import Resources
from orchestrator.backend.ray_training import start
from planners.recovery import Recovery
from tests.builders import compress_local, save_model

UNIT, FINGERPRINT, TOKENS = "recover-model", "f", "tokens/recovery.parquet"
CORE = Resources(num_cpus=1)


def tiny_models(folder):
    """Return a model and a compressed one, in which one linear of each layer has two factors."""
    dense = save_model(folder / "dense")
    compress_local(dense, folder / "run", method="svdllm", keep_fraction=0.9,
                   options={"modules": "up_proj"})  # fmt: skip
    return dense, folder / "run" / "model"


def request(models, out, *, steps, rate=0.01, save_every=20, relative=True):
    """Return a request to train them in a run directory."""
    dense, student = models
    ids = load_file(dense / "tokens" / "calibration.safetensors")["input_ids"]
    Directory(str(out)).write(TOKENS, tokens_to_parquet(ids.numpy(), {}))
    recovery = Recovery(mode="global", steps=steps, batch=4, parts=2, rates=(rate,), held_out=3,
                        relative=relative)  # fmt: skip
    return TrainRequest(
        unit=UNIT,
        fingerprint=FINGERPRINT,
        run_uri=str(out),
        student_uri=str(student),
        checkpoint_uri=str(dense),
        recovery=recovery,
        tokens=TOKENS,
        dtype="float32",
        threads=1,
        device="cpu",
        save_every=save_every,
        stop="training/stop",
    )


def trained_bytes(out):
    """Return the hash of the trained weights, once it has finished."""
    found = newest(Directory(str(out)), UNIT, FINGERPRINT)
    assert found.finished
    return found.file.sha256


def begun(asked, *, fewest=1, most=2):
    """Start a group that may grow within seconds."""
    return start(asked, num_workers=(fewest, most), resources=CORE, name=UNIT, grow_seconds=3.0)


def group():
    """Return process and node of each worker that trains now."""
    alive = [each for each in state.actors().values() if each["State"] == "ALIVE"]
    return [
        (each["Pid"], each["Address"]["NodeID"])
        for each in alive
        if each["ActorClassName"] == "RayTrainWorker"
    ]


class Follower:
    """Looks at the manifests of a training until it has ended."""

    def __init__(self, out):
        self._run = Directory(str(out))
        self._acts = []
        self.seen = {}  # step -> incarnations that wrote it
        self._sizes = {}  # incarnation -> workers
        self.at = {}  # step -> when it was seen first

    def after(self, step, act):
        """Do something once a manifest of so many steps, or more, is there; in this order."""
        self._acts.append((step, act))
        return self

    def until_done(self, training, seconds=240):
        deadline = time.monotonic() + seconds
        while not training.done():
            assert time.monotonic() < deadline, f"not done; seen {sorted(self.seen)}"
            self.look()
            time.sleep(0.1)
        self.look()
        training.result()
        assert not self._acts

    def look(self):
        found = manifests(self._run, UNIT, FINGERPRINT)
        for each in found:
            self.seen.setdefault(each.course.step, set()).add(each.incarnation)
            self.at.setdefault(each.course.step, time.monotonic())
            if each.incarnation not in self._sizes:
                self._sizes[each.incarnation] = len(group())
        if self._acts and found and found[0].course.step >= self._acts[0][0]:
            self._acts.pop(0)[1]()

    @property
    def sizes(self):
        """The numbers of workers of the groups, in their order."""
        return list(self._sizes.values())

    def nothing_twice(self):
        """Return whether every manifest was written once, each by the group after the last."""
        order = [next(iter(self.seen[step])) for step in sorted(self.seen)]
        runs = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
        return all(len(each) == 1 for each in self.seen.values()) and len(set(runs)) == len(runs)

    def report(self):
        """Return when which group was at which step, as text."""
        first = min(self.at.values())
        rows = [
            f"{self.at[step] - first:7.1f} s  step {step}  {sorted(self.seen[step])}"
            for step in sorted(self.seen)
        ]
        return "\n".join([f"sizes {self.sizes}", *rows])
