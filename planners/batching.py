"""How token sequences are divided into microbatches."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatching:
    """How many token sequences pass through a model, in which microbatches and which dtype.

    Attributes:
        sequences: in total.
        sequence_length: tokens of each.
        microbatch_sequences: sequences in one call of a stage; each product is over one call.
        dtype: of the forward pass.
        shards: parts that are summed separately and then added; at most one per microbatch.
    """

    sequences: int
    sequence_length: int
    microbatch_sequences: int
    dtype: str
    shards: int = 1

    @property
    def tokens(self) -> int:
        """Tokens in total."""
        return self.sequences * self.sequence_length

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one call."""
        return self.microbatch_sequences * self.sequence_length

    @property
    def num_microbatches(self) -> int:
        """Number of calls for all sequences."""
        return -(-self.sequences // self.microbatch_sequences)

    @property
    def microbatches(self) -> list[tuple[int, int]]:
        """Sequences of each call as ranges, in order; the last may be smaller."""
        starts = range(0, self.sequences, self.microbatch_sequences)
        return [(a, min(a + self.microbatch_sequences, self.sequences)) for a in starts]


def batching_of(
    sequences: int, sequence_length: int, *, microbatch_tokens: int, dtype: str, shards: int = 1
) -> TokenBatching:
    """Return the batching with the largest microbatches within ``microbatch_tokens``.

    A microbatch has at least one sequence.
    """
    size = min(sequences, max(1, microbatch_tokens // sequence_length))
    return TokenBatching(
        sequences=sequences,
        sequence_length=sequence_length,
        microbatch_sequences=size,
        dtype=dtype,
        shards=min(shards, -(-sequences // size)),
    )
