"""Write a checkpoint with random weights of given shapes, for benchmarks without the real one."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from actors.storage.files import Directory
from actors.storage.tensors import write_tensors


def write_sample(
    directory: Directory, config: Mapping[str, Any], *, sequences: Mapping[str, tuple[int, int]]
) -> None:
    """Write a checkpoint and, for each name, ``NAME.safetensors`` with (sequences, tokens) ids.

    Weights are generated and written layer by layer: at most one layer, or one table, is in memory.
    Seed 0; matrices are scaled so that activations keep their magnitude.
    """
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, config["dtype"])
    rest = {k: v for k, v in config.items() if k not in ("model_type", "dtype")}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **rest))
    files: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        key = f"layer-{parts[2]}" if "layers" in parts else parts[-2]
        files.setdefault(key, {})[name] = tuple(parameter.shape)
    weights: dict[str, str] = {}
    total = 0
    for key, shapes in files.items():
        tensors = {name: _random(shape, dtype, generator) for name, shape in shapes.items()}
        file = f"{key}.safetensors"
        total += write_tensors(directory, file, tensors, metadata={"format": "pt"}).bytes
        weights |= dict.fromkeys(shapes, file)
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    directory.write("model.safetensors.index.json", json.dumps(index).encode())
    directory.write("config.json", json.dumps(dict(config)).encode())
    for name, size in sequences.items():
        ids = torch.randint(0, config["vocab_size"], size, generator=generator)
        write_tensors(directory, f"{name}.safetensors", {"input_ids": ids})


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    made = torch.empty(shape, dtype=dtype)
    return made.normal_(0.0, shape[1] ** -0.5, generator=generator)
