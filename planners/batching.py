"""How token sequences are cut into what passes a model at one time."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatching:
    """How many token sequences pass a model, in which pieces and which dtype.

    Attributes:
        sequences: all together.
        sequence_length: tokens of each.
        microbatch_sequences: that go through a stage in one call; products are formed in it.
        dtype: of the forward pass.
        shards: parts that are summed by themselves and then added, at most one a microbatch.
    """

    sequences: int
    sequence_length: int
    microbatch_sequences: int
    dtype: str
    shards: int = 1

    @property
    def tokens(self) -> int:
        """All together."""
        return self.sequences * self.sequence_length

    @property
    def microbatch_tokens(self) -> int:
        """Tokens of one call."""
        return self.microbatch_sequences * self.sequence_length

    @property
    def num_microbatches(self) -> int:
        """Calls that all sequences take."""
        return -(-self.sequences // self.microbatch_sequences)

    @property
    def microbatches(self) -> list[tuple[int, int]]:
        """Sequences of each call as ranges, in order; the last may be smaller."""
        starts = range(0, self.sequences, self.microbatch_sequences)
        return [(a, min(a + self.microbatch_sequences, self.sequences)) for a in starts]


def batching_of(
    sequences: int, sequence_length: int, *, microbatch_tokens: int, dtype: str, shards: int = 1
) -> TokenBatching:
    """Return the largest microbatches of up to so many tokens, a sequence at the least."""
    size = min(sequences, max(1, microbatch_tokens // sequence_length))
    return TokenBatching(
        sequences=sequences,
        sequence_length=sequence_length,
        microbatch_sequences=size,
        dtype=dtype,
        shards=min(shards, -(-sequences // size)),
    )
