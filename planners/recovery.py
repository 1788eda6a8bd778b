"""Recovery: what of a compressed model is trained, on how many tokens, and at which rates."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

REVISION = 2  # raised when the same input would give different bytes
HELD_OUT = 16  # one sequence in sixteen, at the end, is held out: it decides
MEASURES = 8  # times that the held-out loss is measured, beside before and after
TRIAL = 4  # of several rates, each is tried for a quarter of the steps
# Folders of a run: the checkpoint that is trained, and the trained one.
SHRUNK, TRAINED = "unrecovered/", "recovered/"
STOP = "training/stop"  # a file: while it exists, groups of workers save a checkpoint and end
SHARDS = 2  # of the tokens, whose activations pass the layers side by side
FLOOR = 0.05  # of the rate, at the end of a cosine
BETAS, EPSILON = (0.9, 0.95), 1e-8
RISING = 3.0  # a loss above so many times that at the start ends a training
RISING_STEPS = 20  # where it stays there for so many steps
REPLACED_FIRST, REPLACED_CONSTANT = 0.3, 0.5  # of the layers, with `linear` and `constant`


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a step stands among those of all trials of rates and of the training behind them.

    Attributes:
        trial: which rate is tried; -1 in the training.
        step: of the trial, or of the training, from 0.
        steps: of it in all.
    """

    trial: int
    step: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """How a compressed model is trained; all of it determines bytes.

    Attributes:
        mode: ``local``, each layer alone to the output of the dense layer, or ``global``, the whole
            model to the logits of the dense model.
        loss: of ``global``: ``kl``, the divergence from the dense model's distribution of the next
            token, or ``labels``, the cross-entropy of the text.
        trains: ``made``, the tensors that the cut made and the norms of those layers; ``all``
            tensors of the layers, and the final norm; or ``lora``, two factors of a change of each
            linear of the layers, which are merged at the end.
        steps: of the training, without trials of rates.
        batch: sequences in a step.
        parts: into which a batch is cut; their gradients are summed in order, so the bits do not
            depend on how many workers there are. It divides ``batch``.
        rates: learning rates, the highest first; several are tried, each for a quarter of the
            steps, until one is worse than the one before.
        relative: the rates are relative to the root mean square of each tensor.
        schedule: after the warm-up: ``cosine`` to a twentieth, or ``linear`` to 0.
        warmup: steps in which the rate rises linearly.
        weight_decay: of AdamW, a step.
        clip: largest norm of the gradient of all tensors; 0 does not clip.
        rank: of the factors of ``lora``.
        alpha: their product is scaled by ``alpha / rank``.
        dropout: probability that an input of the factors is dropped.
        replace: in steps of the first half, each layer that the cut changed is the compressed one
            with a probability that is ``constant`` or rises, ``linear``; else the dense model's
            layer is in its place. With ``none`` it always is the compressed one.
        seed: of the order of the sequences, of the factors, of dropout and of which layers are
            replaced.
        held_out: sequences that are not trained on, at the end of the data.
        sequences: of the data, those included.
        length: tokens of a sequence.
    """

    mode: str
    loss: str = "kl"
    trains: str = "made"
    steps: int
    batch: int
    parts: int
    rates: tuple[float, ...]
    relative: bool = True
    schedule: str = "cosine"
    warmup: int = 8
    weight_decay: float = 0.0
    clip: float = 0.0
    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    replace: str = "none"
    seed: int = 0
    held_out: int
    sequences: int = 0
    length: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are trained on, repeats counted, without trials."""
        return self.steps * self.batch * self.length

    @property
    def data_tokens(self) -> int:
        """Tokens of the data."""
        return self.sequences * self.length

    @property
    def trial_steps(self) -> int:
        """Steps for which each of several rates is tried; 0 where there is one."""
        return max(1, self.steps // TRIAL) if len(self.rates) > 1 else 0

    @property
    def all_steps(self) -> int:
        """Steps with those of the trials, if all rates are tried."""
        return self.steps + len(self.rates) * self.trial_steps

    def place(self, step: int) -> Place:
        """Return where one of `all_steps` stands, the first is 0."""
        before = self.all_steps - self.steps  # those of trials
        if step >= before:
            return Place(trial=-1, step=step - before, steps=self.steps)
        trial, own = divmod(step, self.trial_steps)
        return Place(trial=trial, step=own, steps=self.trial_steps)

    def is_measured(self, taken: int) -> bool:
        """Return whether the held-out loss is measured after so many steps of the training."""
        return taken * MEASURES // self.steps > (taken - 1) * MEASURES // self.steps

    def factor(self, step: int, steps: int) -> float:
        """Return the share of the rate at one of ``steps`` steps, the first is 0."""
        warmup = min(self.warmup, steps // 2)
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(steps - warmup, 1)
        if self.schedule == "linear":
            return 1 - done
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))

    def compressed_share(self, step: int, steps: int) -> float:
        """Return the probability that a layer is the compressed one at one of ``steps`` steps."""
        half = steps // 2
        if self.replace == "none" or step >= half:
            return 1.0
        if self.replace == "constant":
            return REPLACED_CONSTANT
        return REPLACED_FIRST + (1 - REPLACED_FIRST) * step / half

    def compressed_layers(self, place: Place, layers: Sequence[int]) -> list[int]:
        """Return which of the layers that the cut changed are the compressed ones in a step.

        Drawn from seed, step and layer alone; if none is drawn, it is the one that was closest.
        """
        share = self.compressed_share(place.step, place.steps)
        coins = {layer: _coin(f"{self.seed} step {place.step} layer {layer}") for layer in layers}
        drawn = [layer for layer in layers if coins[layer] < share]
        return drawn or sorted(layers, key=coins.__getitem__)[:1]


def _coin(name: str) -> float:
    """Return a number from 0 and below 1, drawn from a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6]) / 2**48


def held_out(num_sequences: int) -> int:
    """Return how many of the sequences at the end are held out."""
    return max(1, num_sequences // HELD_OUT)
