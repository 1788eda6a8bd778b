"""The unit that carries the statistics of the step before over, in place of a calibration pass."""

from collections.abc import Mapping

from torch import Tensor

from actors import methods
from actors.devices.transfer import to_device
from actors.layer_units.layer import cut
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob, Done, UnitTask
from actors.numerics.packed import packed
from actors.statistics.rotate import rotated_sums
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_record
from actors.storage.tensors import write_tensors


def carry_statistics(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Write the statistics of one layer, from those before a step that rotated or cut it."""
    former = job.former
    assert former is not None  # the driver plans such a unit after a step only
    residual = methods.spec(former.method).residual
    new = (_rotated if residual else _behind_cut)(task, former, reads)
    name = f"stats/layer-{task.index:05d}.safetensors"
    entry = write_tensors(run, name, {k: v.cpu() for k, v in new.items()})
    values = read_record(Directory(former.run_uri), task.inputs[0]).values
    kept = ("num_tokens", "taps", "influence", "pair_scores")
    return (entry,), {k: values[k] for k in kept if k in values}


def _rotated(task: UnitTask, former: CompressionJob, reads: Reads) -> dict[str, Tensor]:
    """Return the sums after a step that only rotated the residual stream."""
    sums = reads.statistics(former, task.index)
    found = reads.bases(task.inputs[1:], Directory(former.run_uri))
    weights = Checkpoint.of(former).read_layer(task.index)
    norms = ("attn_norm", "mlp_norm")
    scales = {name: to_device(weights[f"{name}.weight"], reads.device) for name in norms}
    bases = (found[0], found[len(found) // 2], found[-1])
    return rotated_sums(sums, bases, scales=scales)


def _behind_cut(task: UnitTask, former: CompressionJob, reads: Reads) -> Mapping[str, Tensor]:
    """Return the sums after a step that cut modules: it cuts the layer again, for its maps."""
    weights = reads.weights(former, task.index)
    sums = reads.statistics(former, task.index)
    _, carried, _ = cut(weights, sums, former, task.index, reads, carry=True)
    return {
        name: packed(tensor) if name.endswith(".gram") and tensor.ndim > 1 else tensor
        for name, tensor in carried.items()
    }
