"""The residual streams that pass the input model and the result side by side, half by half."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from actors.modeling.halves import HalvedLayer
from actors.storage.files import Directory
from actors.storage.tensors import read_tensors, write_tensors

DENSE, REFITTED, DRAFTED = "dense", "refitted", "drafted"
# The linear that ends a half-layer -> what the half adds to the residual stream, and its shortcut.
HALVES: Mapping[str, tuple[Callable[[HalvedLayer, Tensor], Tensor], ...]] = {
    "o_proj": (HalvedLayer.attention, HalvedLayer.shortcut_attention),
    "down_proj": (HalvedLayer.mlp, HalvedLayer.shortcut_mlp),
}
Streams = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """The streams at a site, one file a microbatch; those held out come last.

    Attributes:
        run: the run directory.
        site: of the residual stream.
        num_fitted: microbatches that weights are fitted to.
        num_held: those held out.
        device: where they are read to.
    """

    run: Directory
    site: int
    num_fitted: int
    num_held: int
    device: str

    def name(self, index: int) -> str:
        """Return the file of a microbatch."""
        return f"boundary/refit-site-{self.site:05d}-mb-{index:05d}.safetensors"

    def fitted(self) -> Iterator[Streams]:
        """Return the streams that weights are fitted to."""
        return (self.read(index) for index in range(self.num_fitted))

    def held(self) -> Iterator[Streams]:
        """Return the streams that are held out."""
        return (self.read(index) for index in range(self.num_fitted, self.count))

    @property
    def count(self) -> int:
        """All microbatches."""
        return self.num_fitted + self.num_held

    def all(self) -> Iterator[Streams]:
        """Return the streams of all microbatches."""
        return (self.read(index) for index in range(self.count))

    def read(self, index: int) -> Streams:
        """Return the streams of one microbatch."""
        found = read_tensors(self.run, self.name(index))
        return {name: hidden.to(self.device) for name, hidden in found.items()}

    def write(self, streams: Iterator[Streams]) -> list[dict[str, object]]:
        """Write all microbatches; return what a record says of their files."""
        written = []
        for index, each in enumerate(streams):
            entry = write_tensors(self.run, self.name(index), each)
            written.append({"path": entry.path, "sha256": entry.sha256, "bytes": entry.bytes})
        return written

    def drop(self) -> None:
        """Remove all files."""
        for index in range(self.count):
            self.run.delete(self.name(index))


def streams_after(
    half: str, layers: Mapping[str, HalvedLayer], microbatches: Iterator[Streams]
) -> Iterator[Streams]:
    """Yield the streams after a half-layer."""
    add, shortcut = HALVES[half]
    for streams in microbatches:
        yield {n: shortcut(layers[n], x) + add(layers[n], x) for n, x in streams.items()}
