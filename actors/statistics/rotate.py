"""Rotate the statistics of a model into those after a step that only rotated its residual stream.

With orthogonal bases Q of full width, ``RMSNorm(x Q) Q^T = RMSNorm(x)``. After such a step the
stream at a site is ``x Q``, and what the blocks read is ``(h / s) Q``, h what they read before and
s the scale of the norm, which is now folded into the weights. Activations inside the blocks do not
change. So no calibration pass is needed.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from actors.statistics.kinds import FUNCTIONS, rotated_rows

# Tap -> which of the layer's three bases rotates it, and the norm whose scale is folded away.
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
    """Return the sums that the rotated layer would give on the same tokens, up to rounding.

    Args:
        sums: as `actors.statistics.observe` stores them: ``TAP.KIND``, ``TAP.sum``, ``num_tokens``,
            ``probe``; grams packed, and of any dtype, which they keep.
        bases: of the site that attention reads, of the site that the MLP reads, and of the site
            after the layer; float64, orthogonal, of full width.
        scales: norm -> its scale, without a zero.
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
