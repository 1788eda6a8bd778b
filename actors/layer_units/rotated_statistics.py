"""The unit that rotates the statistics of the step before, in place of a calibration pass."""

from actors.devices.transfer import to_device
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob, Done, UnitTask
from actors.statistics.rotate import rotated_sums
from actors.storage.checkpoint import Checkpoint
from actors.storage.files import Directory
from actors.storage.records import read_record
from actors.storage.tensors import write_tensors


def rotate_statistics(task: UnitTask, job: CompressionJob, run: Directory, reads: Reads) -> Done:
    """Write the statistics of one layer, from those before a step that was a pure rotation."""
    former = job.former
    assert former is not None  # the driver plans such a unit after a step only
    where = Directory(former.run_uri)
    statistics, *bases = task.inputs
    sums = reads.statistics(former, task.index)
    found = reads.bases(tuple(bases), where)
    weights = Checkpoint.of(former).read_layer(task.index)
    norms = ("attn_norm", "mlp_norm")
    scales = {name: to_device(weights[f"{name}.weight"], reads.device) for name in norms}
    new = rotated_sums(sums, (found[0], found[len(found) // 2], found[-1]), scales=scales)
    name = f"stats/layer-{task.index:05d}.safetensors"
    entry = write_tensors(run, name, {k: v.cpu() for k, v in new.items()})
    values = read_record(where, statistics).values
    kept = ("num_tokens", "taps", "influence", "pair_scores")
    return (entry,), {k: values[k] for k in kept if k in values}
