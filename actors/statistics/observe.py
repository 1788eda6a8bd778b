"""The statistics of one layer, accumulated by hooks on its own modules."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actors.devices.transfer import to_host
from actors.statistics.kinds import FUNCTIONS
from planners.families._base import Family
from planners.model.cost import tap_dims
from planners.model.form import LayerForm, dense_form
from planners.model.shape import ModelShape
from planners.model.taps import Statistic, last_tap

# Role whose input or output is a tap. q and k are observed before rope: rope rotates each pair by
# an angle, so the energy of a pair, the only statistic there, is the same before and after.
INPUT_OF = {
    "resid_attn": "attn_norm",
    "resid_mlp": "mlp_norm",
    "attn_in": "q_proj",
    "o_in": "o_proj",
    "mlp_in": "up_proj",
    "mlp_hidden": "down_proj",
}
OUTPUT_OF = {"q_rope": "q_proj", "k_rope": "k_proj", "v": "v_proj"}

COSINE = "resid_out.cosine"
Q_ENERGY, K_ENERGY = "q_rope.pair_energy", "k_rope.pair_energy"
SUMMARISED = (COSINE, Q_ENERGY, K_ENERGY)
Adder = Callable[[Tensor], None]


class ForwardDoneError(Exception):
    """Ends a layer's forward pass after its last tap, where the output is not needed."""


class LayerStatistics:
    """Sums over the tokens that pass through one layer while it is observed.

    Attributes:
        sums: statistic name -> float64 sum, updated in place, grams packed; ``<tap>.sum`` sums x.
        num_tokens: how many tokens were summed.
    """

    def __init__(
        self,
        statistics: Iterable[Statistic],
        shape: ModelShape,
        family: Family,
        *,
        device: str,
        form: LayerForm | None = None,
    ) -> None:
        """Allocate the sums; nothing is observed before `attach`.

        ``form`` has the widths of a layer that is already compressed.
        """
        self._form = form or dense_form(shape)
        self._layer: nn.Module | None = None
        self._statistics = tuple(statistics)
        self._shape, self._family, self._device = shape, family, device
        self.sums: dict[str, Tensor] = {}
        self.num_tokens = 0
        self._probe: list[Tensor] = []
        self._probe_tokens = 0
        for statistic in self._statistics:
            if statistic.probe_tokens:
                self._probe_tokens = statistic.probe_tokens
                continue
            at = tap_dims(shape, statistic.tap, self._form)
            self.sums[str(statistic)] = self._zeros(*statistic.row.dims(at, 0))
            if statistic.row.with_mean:
                self.sums[f"{statistic.tap}.sum"] = self._zeros(at.dim)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, layer: nn.Module, *, ends: bool = False) -> None:
        """Observe a layer's forward passes until `detach`.

        ``ends`` says that the layer's output is not needed: its forward pass raises
        `ForwardDoneError` after the last tap, unless that is the output.
        """
        self._layer = layer
        for tap in dict.fromkeys(statistic.tap for statistic in self._statistics):
            adders = self._adders(tap)
            if tap in INPUT_OF:
                module = layer.get_submodule(self._name(INPUT_OF[tap]))
                hook = partial(_feed_input, adders=adders)
                self._handles.append(module.register_forward_pre_hook(hook))
            elif tap in OUTPUT_OF:
                module = layer.get_submodule(self._name(OUTPUT_OF[tap]))
                hook = partial(_feed_output, adders=adders)
                self._handles.append(module.register_forward_hook(hook))
        if ends:
            tap = last_tap(self._statistics)
            tap = "o_in" if tap in OUTPUT_OF else tap  # the next input in forward order
            if tap in INPUT_OF:
                module = layer.get_submodule(self._name(INPUT_OF[tap]))
                self._handles.append(module.register_forward_pre_hook(_end))

    def detach(self) -> None:
        """Stop observing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def update_residual(self, before: Tensor, after: Tensor | None) -> None:
        """Count a microbatch, and add the statistics that need the output of the layer.

        ``after`` is None where the forward pass ended early.
        """
        self._keep_probe(before)
        self.num_tokens += before.shape[0] * before.shape[1]
        if after is None:
            return
        for add in self._adders("resid_out"):
            add(after)
        if COSINE in self.sums:
            self._add_cosine(before, after)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums and the token count, as they are stored."""
        found = {name: to_host(total) for name, total in self.sums.items()}
        found["num_tokens"] = torch.tensor([self.num_tokens], dtype=torch.int64)
        if self._probe:
            found["probe"] = torch.cat(self._probe)
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Resume from what `tensors` returned, bit for bit."""
        for name, total in self.sums.items():
            total.copy_(tensors[name])
        self.num_tokens = int(tensors["num_tokens"][0])
        self._probe = [tensors["probe"]] if "probe" in tensors else []

    def summary(self) -> dict[str, object]:
        """Return the values that are sent to the driver (see the function `summary`)."""
        found = {name: self.sums[name] for name in SUMMARISED if name in self.sums}
        found["num_tokens"] = torch.tensor([self.num_tokens], dtype=torch.int64)
        return summary(found, [str(statistic) for statistic in self._statistics])

    def _keep_probe(self, before: Tensor) -> None:
        """Store the inputs of the first sequences: at least one, and at most the probe's tokens."""
        left = (self._probe_tokens - self.num_tokens) // before.shape[1]
        if self._probe_tokens and (left > 0 or not self._probe):
            self._probe.append(before[: max(left, 1)].cpu())

    def _name(self, role: str) -> str:
        return self._family.linears.get(role) or self._family.norms[role]

    def _zeros(self, *dims: int) -> Tensor:
        return torch.zeros(dims, dtype=torch.float64, device=self._device)

    def _adders(self, tap: str) -> list[Adder]:
        """Return the functions that add the activations of a tap to its sums."""
        adders: list[Adder] = [
            partial(add, total=self.sums[str(statistic)])
            for statistic in self._statistics
            if statistic.tap == tap and (add := FUNCTIONS[statistic.row.name].add) is not None
        ]
        if f"{tap}.sum" in self.sums:
            adders.append(partial(_add_sum, total=self.sums[f"{tap}.sum"]))
        return adders

    def _add_cosine(self, before: Tensor, after: Tensor) -> None:
        for name in ("attn_shortcut", "mlp_shortcut"):  # the input, in the basis of the output
            shortcut = getattr(self._layer, name, None)
            before = before if shortcut is None else shortcut(before)
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        self.sums[COSINE][0] += cosine.to(torch.float64).sum()


def summary(tensors: Mapping[str, Tensor], taps: Sequence[str]) -> dict[str, object]:
    """Return the values that are sent to the driver: taps, token count, a few numbers.

    Args:
        tensors: as `LayerStatistics.tensors` returns them.
        taps: the statistics that are in them.
    """
    num_tokens = int(tensors["num_tokens"][0])
    found: dict[str, object] = {"num_tokens": num_tokens, "taps": list(taps)}
    if COSINE in tensors:
        found["influence"] = 1.0 - float(tensors[COSINE]) / max(num_tokens, 1)
    if K_ENERGY in tensors:
        found["pair_scores"] = _pair_scores(tensors[Q_ENERGY], tensors[K_ENERGY])
    return found


def _pair_scores(
    q_energy: Float[Tensor, "heads pairs"], k_energy: Float[Tensor, "kv_heads pairs"]
) -> list[float]:
    """Return the share of each rope pair in the scores of a KV head, the mean over the heads."""
    kv_heads, pairs = k_energy.shape
    scores = (q_energy.reshape(kv_heads, -1, pairs).sum(dim=1) * k_energy).sqrt()
    shares = scores / scores.sum(dim=1, keepdim=True).clamp_min(torch.finfo(scores.dtype).tiny)
    return [float(share) for share in shares.mean(dim=0)]


def added(parts: Iterable[Mapping[str, Tensor]], taps: Collection[str]) -> dict[str, Tensor]:
    """Return the sums over all tokens, by adding those over parts of them in order.

    Args:
        parts: as `LayerStatistics.tensors` returns them, in the order of their tokens.
        taps: the statistics to add, which all parts have; a part may have more.

    Returns:
        What one pass over all the tokens returns, up to rounding.
    """
    statistics = [Statistic(*name.split(".")) for name in taps]
    means = {f"{each.tap}.sum" for each in statistics if each.row.with_mean}
    probe_tokens = sum(each.probe_tokens for each in statistics)
    total: dict[str, Tensor] = {}
    probes: list[Tensor] = []
    for part in parts:
        for name in sorted(part.keys() & {"num_tokens", *taps, *means}):
            total[name] = total[name].add_(part[name]) if name in total else part[name].clone()
        probes += [part["probe"]] if probe_tokens else []
    if probes:
        sequences = max(1, probe_tokens // probes[0].shape[1])
        total["probe"] = torch.cat(probes)[:sequences].clone()
    return total


def _end(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    del module, args
    raise ForwardDoneError


def _feed_input(module: nn.Module, args: tuple[Tensor, ...], *, adders: list[Adder]) -> None:
    del module
    for add in adders:
        add(args[0])


def _feed_output(
    module: nn.Module,
    args: tuple[Tensor, ...],
    output: Tensor,
    *,
    adders: list[Adder],
) -> None:
    del module, args
    for add in adders:
        add(output)


def _add_sum(x: Tensor, *, total: Tensor) -> None:
    total.add_(x.flatten(0, -2).sum(dim=0, dtype=torch.float32))
