"""Train a whole compressed model to the model that it was made from, in a group of workers."""

import time
from collections.abc import Container, Mapping

import torch

from actors.devices.memory import return_large_blocks
from actors.messages import TrainRequest
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.tokens import tokens_from_parquet
from actors.training.adapters import Adapters
from actors.training.checkpoints import Checkpoints
from actors.training.distillation import Distillation
from actors.training.division import Division, recompute
from actors.training.group import Group
from actors.training.lessons import Lessons, Replaces, Trained, nothing
from actors.training.replacement import Replacement
from actors.training.resume import Durability, complete, found_for
from actors.training.trained import Tensors, linears_of, made
from actors.training.whole_model import WholeModel
from planners.errors import ConfigError
from planners.recovery import Recovery

LOOK_SECONDS = 2.0  # between two looks for a request to stop
NOTHING, STOP, ASK = 0.0, 1.0, 2.0  # what the first worker found when it looked


def train(request: TrainRequest, group: Group) -> None:
    """Train to the end, or until the group is asked to stop; resume from the newest checkpoint.

    What is found is in the run directory: `actors.training.checkpoints.newest`.

    Raises:
        ConfigError: the parts of a batch cannot be divided by the workers, or nothing was made.
        ModelError: a weight of one of the models is missing or not finite.
        NumericsError: the loss is no number, or far above that at the start.
    """
    torch.set_num_threads(request.threads)
    return_large_blocks()
    run = Directory(request.run_uri)
    checkpoints = Checkpoints(run, request.unit, request.fingerprint, writes=group.rank == 0)
    found = found_for(checkpoints, group.agreed)
    if found and found.finished:
        return
    lessons, trained = _lessons(request, group, run)
    durability = Durability(
        checkpoints=checkpoints,
        save_every=request.save_every,
        stops=_Watch(request, group, run).stops,
    )
    course, results = complete(found, lessons, trained, request.recovery, durability)
    if results:
        checkpoints.save(course, results, finished=True)


def _lessons(request: TrainRequest, group: Group, run: Directory) -> tuple[Lessons, Trained]:
    """Load both models and the tokens."""
    recovery, device = request.recovery, request.device
    division = Division(device) if request.divided and group.size > 1 else None
    products = getattr(torch, request.dtype)
    store = request.model_store
    compressed = Checkpoint(request.student_uri, model_store=store, device=device)
    student = WholeModel(
        compressed, dtype=torch.float32, device=device, products=products, division=division
    )
    dense = Checkpoint.of(request, device=device)
    before = dense
    if request.input_uri:
        before = Checkpoint(request.input_uri, model_store=store, device=device)
    shared = compressed.shared
    cut = _made(student, before, recovery, taken=shared)
    trained = _trained(student, cut, recovery, shared=shared, division=division)
    if division:
        for layer in student.layers.values():
            recompute(layer, trained.contexts)
    teacher = None
    if recovery.loss == "kl":
        teacher = WholeModel(dense, dtype=products, device=device, division=division)
    ids = torch.from_numpy(tokens_from_parquet(run.read(request.tokens)))
    source = Distillation(student, teacher, ids)
    replaces: Replaces = nothing
    if teacher is not None and recovery.replace != "none":
        replaces = Replacement(student, teacher, list(cut), recovery, shared=shared).standing
    lessons = Lessons(source, trained, recovery, group, num_sequences=len(ids), replaces=replaces)
    return lessons, trained


def _made(
    student: WholeModel, dense: Checkpoint, recovery: Recovery, *, taken: Container[str]
) -> dict[str, list[str]]:
    """Return prefix -> tensors that were made, of each changed layer; empty where none asks.

    A tensor that layers share belongs to the one that stores it.
    """
    if recovery.trains != "made" and recovery.replace == "none":
        return {}
    found = {}
    for prefix, layer in student.layers.items():
        names = [name for name, _ in layer.named_parameters() if prefix + name in taken]
        found[prefix] = made(layer, dense.read_prefix(prefix), frozen=names)
    return {prefix: names for prefix, names in found.items() if names}


def _trained(
    student: WholeModel,
    cut: Mapping[str, list[str]],
    recovery: Recovery,
    *,
    shared: Mapping[str, str],
    division: Division | None,
) -> Trained:
    """Return what of a model is trained: never the embedding, positions or the head.

    Adapters leave out what layers share: merged into one, they would change the other.
    """
    layers = student.layers
    if recovery.trains == "lora":
        frozen = {*shared, *shared.values()}
        named = {
            p + n: each
            for p, layer in layers.items()
            for n, each in linears_of(layer).items()
            if f"{p}{n}.weight" not in frozen
        }
        return Adapters(named, recovery)
    if recovery.trains == "made":
        names = [prefix + name for prefix, own in cut.items() for name in own]
        if not names:
            raise ConfigError(
                "recovery: there is nothing to train: the layers are those of the input model",
                hint="to train them all the same, choose all in place of made",
            )
    else:
        parts = [*layers.items(), student.final_norm]
        names = [p + n for p, module in parts for n, _ in module.named_parameters()]
        names = [name for name in names if name not in shared]
    return Tensors(student.module, names, recovery, division=division)


class _Watch:
    """Looks, now and then, whether the group is to stop; all workers learn the same."""

    def __init__(self, request: TrainRequest, group: Group, run: Directory) -> None:
        self._request, self._group, self._run = request, group, run
        self._looked = 0.0

    def stops(self) -> bool:
        """Return whether to save a checkpoint and end; called by all workers after each step."""
        due = self._group.rank == 0 and time.monotonic() - self._looked > LOOK_SECONDS
        found = self._group.agreed(self._look() if due else NOTHING)
        return found == STOP or (found == ASK and self._group.leaves())

    def _look(self) -> float:
        self._looked = time.monotonic()
        return ASK if self._run.size(self._request.stop) is None else STOP
