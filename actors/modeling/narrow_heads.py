"""The stock config of a model whose heads keep one set of rope pairs.

A stock rope of narrower heads has other frequencies than the pairs that were kept. ``longrope``
divides each frequency by a factor of its own, so with the right factors they are those again; its
lists for short and long sequences are the same, and its attention factor is the original's, so
that nothing else of it has an effect.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from actors.modeling.outer_model import rope_of

OLD_KEYS = ("rope_scaling", "rope_theta", "original_max_position_embeddings")


def narrowed(config: Mapping[str, Any], pairs: Sequence[int]) -> dict[str, Any]:
    """Return the config with heads of these rope pairs.

    Args:
        config: of a stock model, ``model_type`` among its keys.
        pairs: kept ones, ascending.
    """
    frequencies, attention_factor, longest = rope_of(config)
    theta = 10000.0  # any base would do
    factors = [
        theta ** (-place / len(pairs)) / float(frequencies[pair])
        for place, pair in enumerate(pairs)
    ]
    return {
        **{key: value for key, value in config.items() if key not in OLD_KEYS},
        "head_dim": 2 * len(pairs),
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": theta,
            "factor": 1.0,
            "attention_factor": attention_factor,
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": longest,
        },
    }
