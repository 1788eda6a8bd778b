"""Train the model that ships with the package, ``actors/models/tiny``, or a small one to try with.

A Llama of one million parameters that has read the standard library of Python: small enough to be
package data, trained enough that compressing it badly shows. To reproduce it (CPython 3.11, about
20 minutes on two idle cores), from the root of the repository:

    python -m examples.train_tiny

An OPT that has read the same text, for measurements on another architecture (half the parameters
and a third of the steps; it does not ship):

    python -m examples.train_tiny --family opt

The defaults are the values they were made with. The tokenizer and the two token files depend on the
text alone and are written first; the weights and the model card are written again every few
minutes, so that an interrupted training leaves a model that loads.
"""

import argparse
import json
import logging
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from actors.storage.texts import SPLITS, read_texts

BOS, EOS = "<s>", "</s>"
BOS_ID, EOS_ID = 0, 1
VOCABULARY = 512
CONTEXT = 256
CALIBRATION_SEQUENCES = 96
EVALUATION_SEQUENCES = 48

logger = logging.getLogger("train_tiny")

_CARD = """\
---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---

# {family.title}

{family.introduction}

## Model

{family.shape}, context {context}, tied embeddings, float32. The tokenizer is a byte-level BPE of
{vocabulary} tokens (`<s>` = 0, `</s>` = 1) trained on the same text; it encodes any text.

## Data

The `.py` files of the standard library of CPython {python}, without its tests. A file belongs to
one split only, by the hash of its path: about 17 in 20 to train, 2 to calibration, 1 to evaluation.

| file | split | sequences | tokens each |
|---|---|---|---|
| `calibration.safetensors` | calibration | {calibration_sequences} | {context} |
| `evaluation.safetensors` | evaluation | {evaluation_sequences} | {context} |

Each file holds one int64 tensor, `input_ids`. A sequence is `<s>` and then consecutive tokens of
the split, where `</s>` ends each source file; the sequences are spread evenly over the split.

## Training

| | |
|---|---|
| steps | {progress.steps:,} of {recipe.batch_sequences} sequences |
| tokens | {progress.tokens:,}: {passes:.1f} passes over the {train_tokens:,} of the train split |
| time | {progress.seconds:,.0f} s on {recipe.threads} CPU threads |
| optimiser | AdamW (0.9, 0.95), weight decay {recipe.weight_decay:g} on matrices |
| peak learning rate | {recipe.peak_learning_rate:g} |
| schedule | {recipe.warmup_steps} steps of warm-up, then a cosine to zero |
| gradient norm | at most {recipe.max_gradient_norm:g} |
| seed | {recipe.seed} |
| versions | torch {torch}, transformers {transformers} |

Made by `{family.command}`.

## Quality

On the {predicted_tokens:,} predicted tokens of `evaluation.safetensors`:

| | perplexity |
|---|---|
| this model | {quality.model_perplexity:.3f} |
| token frequencies of the train split, add-one | {quality.unigram_perplexity:.2f} |
| ratio | {quality.gain:.1f} |

## Licence

The weights and the tokenizer are under the Apache License 2.0. The text they were trained on, and
that the two token files hold excerpts of, is under the Python Software Foundation License.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """An architecture that is trained, and what its card says of it.

    Attributes:
        title: of the card.
        introduction: its first paragraph.
        shape: the beginning of its paragraph on the model.
        command: that makes it.
        config: of transformers.
        output: where it goes unless told otherwise.
        steps: of the optimiser, unless told otherwise.
    """

    title: str
    introduction: str
    shape: str
    command: str
    config: PreTrainedConfig
    output: Path
    steps: int


FAMILIES = {
    "llama": Family(
        title="tiny",
        introduction="""\
A Llama of 988,544 parameters trained from scratch on the source of Python's standard library. It
exists to be compressed: in tests, in examples and in a first run without network or GPU. It
writes text that looks like Python; it is no use as an assistant or for writing real code.""",
        shape="""\
`LlamaForCausalLM`: 5 layers, hidden 128, intermediate 352, 8 heads and 4 key-value heads of
16 dimensions""",
        command="python -m examples.train_tiny",
        config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=16,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        ),
        output=Path("actors/models/tiny"),
        steps=3600,
    ),
    "opt": Family(
        title="opt-small",
        introduction="""\
An OPT of 521,472 parameters trained from scratch on the source of Python's standard library. It
exists to be compressed where a measurement needs LayerNorm, biases, learned positions and an FFN
without a gate. It writes text that looks a little like Python, and is of no other use.""",
        shape="""\
`OPTForCausalLM`: 4 layers, hidden 96, intermediate 384, ReLU, 6 heads of
16 dimensions""",
        command="python -m examples.train_tiny --family opt",
        config=OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=96,
            ffn_dim=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            max_position_embeddings=CONTEXT,
            dropout=0.0,
            tie_word_embeddings=True,
            pad_token_id=None,  # its default is our </s>, whose embedding would stay untrained
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
        ),
        output=Path("runs/opt-small"),
        steps=1200,
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What determines the weights, besides the text and the libraries."""

    steps: int
    batch_sequences: int
    warmup_steps: int
    peak_learning_rate: float
    weight_decay: float
    max_gradient_norm: float
    seed: int
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a training has come."""

    steps: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """Perplexities on the same predicted tokens."""

    model_perplexity: float
    unigram_perplexity: float

    @property
    def gain(self) -> float:
        """How many times lower the model's perplexity is than the unigram's."""
        return self.unigram_perplexity / self.model_perplexity


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Return a byte-level BPE of ``VOCABULARY`` tokens; it can encode any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS],  # In the order of their ids.
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, BOS_ID)],
    )
    # "<s>" written in a text is three characters, not the beginning of a sequence.
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode_stream(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """Return the token ids (int64) of all texts in one row, each text followed by ``</s>``."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return torch.cat([torch.tensor([*encoding.ids, EOS_ID]) for encoding in encodings])


def cut_sequences(stream: Tensor, starts: Tensor) -> Tensor:
    """Return ``<s>`` and the ``CONTEXT - 1`` tokens from each start, (starts, CONTEXT)."""
    tokens = stream[starts[:, None] + torch.arange(CONTEXT - 1)]
    return torch.cat([torch.full_like(starts, BOS_ID)[:, None], tokens], dim=1)


def sample_sequences(stream: Tensor, num_sequences: int, *, generator: torch.Generator) -> Tensor:
    """Return sequences spread over the stream: one at random from each of equal parts of it."""
    num_chunks = len(stream) // (CONTEXT - 1)
    edges = torch.linspace(0, num_chunks, num_sequences + 1).long()  # Parts of whole chunks.
    offsets = torch.rand(num_sequences, generator=generator) * edges.diff()
    return cut_sequences(stream, (edges[:-1] + offsets.long()) * (CONTEXT - 1))


def draw_batches(
    stream: Tensor, *, batch_sequences: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield batches for ever; each epoch cuts the stream at other places and in another order."""
    stride = CONTEXT - 1
    while True:
        phase = int(torch.randint(stride, (), generator=generator))
        starts = torch.arange(phase, len(stream) - stride + 1, stride)
        shuffled = starts[torch.randperm(len(starts), generator=generator)]
        num_batches = len(starts) // batch_sequences
        for batch in shuffled[: num_batches * batch_sequences].view(num_batches, -1):
            yield cut_sequences(stream, batch)


def build_model(config: PreTrainedConfig, *, seed: int) -> PreTrainedModel:
    """Return the untrained model."""
    torch.manual_seed(seed)  # transformers initialises from the global generator.
    return AutoModelForCausalLM.from_config(config)


def build_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW that decays matrices and leaves norms and biases alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.peak_learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )


def learning_rate_factor(step: int, *, recipe: Recipe) -> float:
    """Return the share of the peak at ``step``: a linear rise, then half a cosine down to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    done = (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def predict_nats(model: PreTrainedModel, sequences: Tensor) -> Tensor:
    """Return the negative log-likelihood of each token but the first, (sequences * tokens,)."""
    logits = model(input_ids=sequences, use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), sequences[:, 1:].flatten(), reduction="none")


def train(
    model: PreTrainedModel,
    stream: Tensor,
    recipe: Recipe,
    *,
    checkpoint_seconds: float,
    save: Callable[[Progress], None],
) -> None:
    """Train ``model`` in place and call ``save`` every ``checkpoint_seconds`` and at the end."""
    optimizer = build_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, recipe=recipe)
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    batches = draw_batches(stream, batch_sequences=recipe.batch_sequences, generator=generator)
    start = saved = time.monotonic()
    for step, batch in zip(range(1, recipe.steps + 1), batches, strict=False):
        loss = predict_nats(model, batch).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_gradient_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        now = time.monotonic()
        progress = Progress(steps=step, tokens=step * batch.numel(), seconds=now - start)
        if step % 50 == 0:
            speed = progress.tokens / progress.seconds
            logger.info(
                "step %d  loss %.4f  gradient norm %.2f  tokens/s %.0f",
                step,
                loss.item(),
                norm.item(),
                speed,
            )
        if step == recipe.steps or now - saved > checkpoint_seconds:
            save(progress)
            saved = now


@torch.inference_mode()
def measure(model: PreTrainedModel, evaluation: Tensor, train_stream: Tensor) -> Quality:
    """Return the perplexity of the model and of add-one token frequencies of the train split."""
    targets = evaluation[:, 1:]
    nats = predict_nats(model, evaluation).double().sum()
    counts = torch.bincount(train_stream, minlength=VOCABULARY).double() + 1
    unigram_nats = -(counts / counts.sum()).log()[targets].sum()
    return Quality(
        model_perplexity=math.exp(nats / targets.numel()),
        unigram_perplexity=math.exp(unigram_nats / targets.numel()),
    )


def publish(write: Callable[[Path], None], directory: Path) -> None:
    """Let ``write`` fill an empty folder, then move its files to ``directory`` one by one.

    So a reader finds a whole file at any moment, the old one or the new one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".tiny-") as temporary:
        write(Path(temporary))
        for path in sorted(Path(temporary).iterdir()):
            path.chmod(0o644)  # safetensors writes files that only their owner may read.
            path.replace(directory / path.name)


def write_data_files(
    directory: Path, *, tokenizer: Tokenizer, calibration: Tensor, evaluation: Tensor
) -> None:
    """Write the tokenizer and the two token files: what does not change while training."""
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    ).save_pretrained(directory)
    # Written under the name of transformers 5 only; this one is known to older readers as well.
    config_path = directory / "tokenizer_config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file({"input_ids": calibration}, directory / "calibration.safetensors")
    save_file({"input_ids": evaluation}, directory / "evaluation.safetensors")


def model_card(
    family: Family, recipe: Recipe, progress: Progress, quality: Quality, *, train_tokens: int
) -> str:
    """Return the text of the README beside the weights."""
    return _CARD.format(
        family=family,
        context=CONTEXT,
        vocabulary=VOCABULARY,
        calibration_sequences=CALIBRATION_SEQUENCES,
        evaluation_sequences=EVALUATION_SEQUENCES,
        predicted_tokens=EVALUATION_SEQUENCES * (CONTEXT - 1),
        train_tokens=train_tokens,
        passes=progress.tokens / train_tokens,
        recipe=recipe,
        progress=progress,
        quality=quality,
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
    )


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(
        description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, default="llama", help="architecture")
    for option, kind, what in (("--output", Path, "folder"), ("--steps", int, "optimiser steps")):
        parser.add_argument(
            option, type=kind, default=argparse.SUPPRESS, help=f"{what} (default: the family's)"
        )
    parser.add_argument("--batch-sequences", type=int, default=16, help="sequences in a step")
    parser.add_argument("--warmup-steps", type=int, default=100, help="steps of rising rate")
    parser.add_argument("--peak-learning-rate", type=float, default=3e-3, help="after warm-up")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices")
    parser.add_argument("--max-gradient-norm", type=float, default=1.0, help="clipped above")
    parser.add_argument("--seed", type=int, default=20, help="of weights, batches and samples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--checkpoint-seconds", type=float, default=150, help="between saves")
    return parser.parse_args()


def main() -> None:
    """Train the tokenizer, cut the token files, train the model, and measure it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = vars(parse_arguments())
    family = FAMILIES[options.pop("family")]
    options = {"output": family.output, "steps": family.steps, **options}
    output: Path = options.pop("output")
    checkpoint_seconds: float = options.pop("checkpoint_seconds")
    recipe = Recipe(**options)
    torch.set_num_threads(recipe.threads)
    transformers.utils.logging.disable_progress_bar()

    texts = {split: list(read_texts("stdlib", split=split)) for split in SPLITS}
    tokenizer = train_tokenizer(texts["train"])
    streams = {split: encode_stream(tokenizer, texts[split]) for split in texts}
    for split, stream in streams.items():
        logger.info("%s: %d files, %d tokens", split, len(texts[split]), len(stream))
    generator = torch.Generator().manual_seed(recipe.seed)
    calibration = sample_sequences(
        streams["calibration"], CALIBRATION_SEQUENCES, generator=generator
    )
    evaluation = sample_sequences(streams["evaluation"], EVALUATION_SEQUENCES, generator=generator)
    publish(
        lambda folder: write_data_files(
            folder, tokenizer=tokenizer, calibration=calibration, evaluation=evaluation
        ),
        output,
    )

    model = build_model(family.config, seed=recipe.seed)

    def save(progress: Progress) -> None:
        quality = measure(model, evaluation, streams["train"])
        card = model_card(family, recipe, progress, quality, train_tokens=len(streams["train"]))

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            (folder / "README.md").write_text(card, encoding="utf-8")

        publish(write, output)
        logger.info("after %s: %s", progress, quality)

    train(model, streams["train"], recipe, checkpoint_seconds=checkpoint_seconds, save=save)
    quality = measure(model, evaluation, streams["train"])
    print(f"model perplexity    {quality.model_perplexity:.4f}")
    print(f"unigram perplexity  {quality.unigram_perplexity:.4f}")
    print(f"ratio               {quality.gain:.2f}")


if __name__ == "__main__":
    main()
