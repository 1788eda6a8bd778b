"""The config of a Llama whose layers differ in FFN width, as DeciLM and Nemotron-NAS store it.

This file travels with a model in that form. transformers has no class for its model type, and vLLM,
which has the model, reads the widths of a layer as attributes. It is the only code of such a model.
"""

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A part of the config of a layer: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        """Return the value of a key."""
        if name not in self:
            raise AttributeError(name)
        return self[name]


class DeciConfig(LlamaConfig):
    """A Llama's config with ``block_configs``: what differs from layer to layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: Any = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.block_configs = [
            Block({part: Block(facts) for part, facts in block.items()}) for block in block_configs
        ]
