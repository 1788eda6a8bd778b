"""The layers with which one layer shares tensors, as a method is given them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from actors.devices.transfer import to_device
from actors.layer_units.reads import Reads
from actors.messages import CompressionJob
from actors.methods._neighbours import Neighbours
from actors.storage.files import Directory
from actors.storage.records import read_record
from actors.storage.tensors import map_tensors
from planners.budget.sharing import PREVIOUS
from planners.families import load as load_family
from planners.model.form import SOURCE, LayerForm, factor_owners
from planners.units.kinds import STATISTICS, kind_of, layer_of


def sources_of(form: LayerForm, neighbours: Neighbours) -> dict[str, Tensor]:
    """Return the matrices to which the linears of a layer are changes, by their roles."""
    return {
        f"{name}.{SOURCE}.weight": neighbours.weights(link.layer)[f"{name}.weight"]
        for name, link in form.links.items()
        if SOURCE in link.parts
    }


class SharingLayers:
    """Reads other layers for one layer; see `actors.methods._neighbours.Neighbours`."""

    def __init__(
        self,
        index: int,
        job: CompressionJob,
        run: Directory,
        reads: Reads,
        *,
        inputs: Sequence[str] = (),
    ) -> None:
        """Know which layer, and the units that it reads."""
        self._index, self._job, self._run, self._reads = index, job, run, reads
        self._read: dict[int, Mapping[str, Tensor]] = {}
        self._made = {
            layer_of(name): name
            for name in inputs
            if (kind := kind_of(name)) is not None and kind.leaves != STATISTICS
        }

    @property
    def takers(self) -> Mapping[int, LayerForm]:
        """The layers that take factors from this one, in order, with their forms."""
        form = self._job.form
        found = sorted(taker for taker, owner in factor_owners(form) if owner == self._index)
        return {taker: form.layers[taker] for taker in found}

    def weights(self, layer: int) -> Mapping[str, Tensor]:
        """Return the tensors of another layer of the step's input model.

        In measurements of a layer alone that is the layer before; the first one, which nothing is
        before, is measured for nothing.
        """
        known = max(self._index - 1, 0) if layer == PREVIOUS else layer
        if known not in self._read:
            self._read[known] = self._reads.weights(self._job, known)
        return self._read[known]

    def sums(self, layer: int) -> Mapping[str, Tensor]:
        """Return the statistics of a taker."""
        return self._reads.statistics(self._job, layer)

    def stored(self, layer: int) -> Mapping[str, Tensor]:
        """Return what the result stores of the layer from which this one takes factors."""
        family = load_family(self._job.shape.family)
        prefix = family.layer.format(i=layer) + "."
        (file,) = read_record(self._run, self._made[layer]).files
        return {
            family.role_of(name.removeprefix(prefix)): to_device(tensor, self._reads.device)
            for name, tensor in map_tensors(self._run, file).items()
        }
