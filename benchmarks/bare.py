"""What the benchmarks compare with: transformers' own layers in a loop, and plain products."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.utils import logging as transformers_logging

from actors.storage.files import Directory
from actors.storage.tokens import tokens_to_parquet

transformers_logging.disable_progress_bar()

VOCABULARY = 512  # small: the benchmarks are about layers
TOKENS = "tokens/calibration.parquet"


def llama(
    *, hidden: int, intermediate: int, num_layers: int, num_heads: int, vocabulary: int = 0
) -> LlamaConfig:
    """Return the config of a Llama; where no vocabulary is given its head is its embedding."""
    return LlamaConfig(
        vocab_size=vocabulary or VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=not vocabulary,
        dtype="float32",
    )


def write_random_model(directory: Path, config: LlamaConfig) -> None:
    """Write a float32 checkpoint with transformers' own random initialisation, seed 0."""
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)


def write_random_tokens(run: Path, *, num_sequences: int, sequence_length: int) -> Tensor:
    """Write calibration tokens, uniform, seed 0, where a stage of a run looks; return them."""
    shape = (num_sequences, sequence_length)
    ids = np.random.default_rng(0).integers(0, VOCABULARY, size=shape)
    Directory(str(run)).write(TOKENS, tokens_to_parquet(ids, {"source": "random"}))
    return torch.from_numpy(ids)


def load_bare(directory: Path) -> LlamaModel:
    """Return the decoder of a checkpoint as transformers loads it, without the head."""
    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.model.eval()


@torch.inference_mode()
def bare_forward(model: LlamaModel, ids: Tensor, *, grams: bool) -> Tensor:
    """Return the last hidden states; with ``grams`` also form, and drop, the 2L + 1 products.

    The products are of the layers' inputs: the same shapes, hence the same work, as those at the
    sites inside a layer, which a loop without hooks does not see.
    """
    hidden = model.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None]
    angles = model.rotary_emb(hidden, position_ids=positions)
    for layer in model.layers:
        if grams:
            _product(hidden)
            _product(hidden)
        hidden = layer(hidden, attention_mask=None, position_embeddings=angles)
    if grams:
        _product(hidden)
    return hidden


def _product(hidden: Tensor) -> Tensor:
    x = hidden.flatten(0, 1)  # (tokens, hidden)
    return x.T @ x
