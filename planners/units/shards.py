"""Shards of the calibration tokens: each is summed separately, and the sums are added in order.

Each shard passes through its own chain of stages, so several run side by side and more workers than
layers can be used. The number of shards determines how sums round, so it comes from the recipe and
never from the available workers: they only limit how many shards run at the same time.
"""

from collections.abc import Sequence
from dataclasses import replace

from planners.canonical_json import fingerprint
from planners.units.units import Unit


def chain_stages(num_workers: int, num_shards: int) -> int:
    """Return how many workers one chain may have if all shards run side by side."""
    return max(1, num_workers // num_shards)


def even_shards(num_layers: int, num_workers: int, num_microbatches: int) -> int:
    """Return the fewest shards with which all workers hold equally many layers; 0 if none."""
    for count in range(1, min(num_workers, num_microbatches) + 1):
        stages, left = divmod(num_workers, count)
        if not left and num_layers % stages == 0:
            return count
    return 0


def rounds(num_shards: int, num_chains: int) -> list[range]:
    """Return the shards that run side by side, round by round."""
    starts = range(0, num_shards, num_chains)
    return [range(start, min(start + num_chains, num_shards)) for start in starts]


def shard_units(sums: Sequence[Unit], shard: int, count: int) -> list[Unit]:
    """Return the units of the sums of one shard; the statistics units if it is the only one.

    Args:
        sums: the statistics units, one a layer.
        shard: its number, from 0.
        count: of all shards.
    """
    if count == 1:
        return list(sums)
    return [
        replace(
            unit,
            name=f"shard-{shard:05d}-layer-{unit.index:05d}",
            kind="shard",
            inputs=(),
            fingerprint=fingerprint({"of": unit.fingerprint, "shard": [shard, count]}),
            lasting=False,
        )
        for unit in sums
    ]


def added_units(sums: Sequence[Unit], shards: Sequence[Sequence[Unit]]) -> list[Unit]:
    """Return the units that add the shards of each layer, in order."""
    return [
        replace(unit, inputs=tuple(each.name for each in parts))
        for unit, *parts in zip(sums, *shards, strict=True)
    ]
