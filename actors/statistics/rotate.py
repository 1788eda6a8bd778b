"""Rotate the statistics of a model for a step that only rotates its residual stream.

With orthogonal bases Q of full width, ``RMSNorm(x Q) Q^T = RMSNorm(x)``. After such a step the
stream at a site is ``x Q``, and the input of the blocks is ``(h / s) Q``, with h their input before
and s the scale of the norm, which is now folded into the weights. Activations inside the blocks do
not change. So no calibration pass is needed.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from actors.statistics.kinds import FUNCTIONS, rotated_rows

# Tap -> index of the layer's basis that rotates it, and the norm whose scale was folded.
ROTATED_TAPS: Mapping[str, tuple[int, str]] = {
    "resid_attn": (0, ""),
    "attn_in": (0, "attn_norm"),
    "resid_mlp": (1, ""),
    "mlp_in": (1, "mlp_norm"),
    "resid_out": (2, ""),
}


def rotated_sums(
    sums: Mapping[str, Tensor],
    bases: tuple[Float[Tensor, "hidden hidden"], ...],
    *,
    scales: Mapping[str, Float[Tensor, " hidden"]],
) -> dict[str, Tensor]:
    """Return the sums of the rotated layer on the same tokens, up to rounding.

    Args:
        sums: as `actors.statistics.observe` stores them: ``TAP.KIND``, ``TAP.sum``, ``num_tokens``,
            ``probe``; grams packed; the dtypes are kept.
        bases: of the site that attention reads, of the site that the MLP reads, and of the site
            after the layer; float64, orthogonal, of full width.
        scales: norm -> its scale, without zeros.
    """
    new = {}
    for name, total in sums.items():
        tap, _, kind = ("resid_attn.probe" if name == "probe" else name).partition(".")
        rotate = rotated_rows if kind == "sum" else FUNCTIONS[kind].rotate if kind else None
        if rotate is not None and tap in ROTATED_TAPS:
            position, norm = ROTATED_TAPS[tap]
            map_ = bases[position]
            if norm:
                map_ = map_ / scales[norm].to(torch.float64)[:, None]
            new[name] = rotate(total, map_).to(total.dtype)
        else:
            new[name] = total
    return new
