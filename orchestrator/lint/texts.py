"""Checks of a text before it is used for calibration."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from actors.storage.sources import resolve_model
from actors.storage.texts import read_texts
from actors.storage.tokens import prepare_tokens

Level = Literal["ok", "warning", "error"]
GRAM_WORDS = 13  # shared words in a row that count as an overlap, by common practice
MAX_TEXTS = 200_000
BUCKETS = (64, 256, 1024, 4096, 16384, 65536)  # characters
# name -> (warn from, fail from), as shares from 0 to 1
LIMITS: Mapping[str, tuple[float, float]] = {
    "duplicates": (0.05, 0.30),
    "short": (0.30, 0.90),
    "broken": (0.0001, 0.01),
    "control": (0.001, 0.05),
    "overlap": (0.001, 0.05),
    "repeated sequences": (0.01, 0.20),
}
SHORT = 64  # characters; a text of fewer is a heading, not a text
MEANING = {
    "duplicates": "texts that repeat an earlier one, ignoring blanks and case",
    "short": f"texts of fewer than {SHORT} characters",
    "broken": "characters lost in another encoding (U+FFFD)",
    "control": "control characters",
    "overlap": f"runs of {GRAM_WORDS} words of the evaluation text that this text contains too",
    "repeated sequences": "sequences of tokens that repeat an earlier one",
}
FIXES = {
    "duplicates": "remove them: each copy counts again in the statistics",
    "short": "join them, or remove them",
    "broken": "decode the source in the encoding that it was written in",
    "control": "strip them",
    "overlap": "remove the evaluation text from the calibration data: it lowers the perplexity",
    "repeated sequences": "use fewer sequences, or more text",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """The share of one defect in a text.

    Attributes:
        name: a key of `LIMITS`.
        share: from 0 to 1.
        level: by the limits.
        meaning: what was counted.
        fix: what would be right; empty where nothing is wrong.
    """

    name: str
    share: float
    level: Level
    meaning: str
    fix: str


def lint_texts(
    source: str, *, evaluation: str, model: str, sequence_length: int
) -> dict[str, Any]:  # fmt: skip
    """Return the size of a text source and the share of each defect.

    Args:
        source: of text; see `actors.storage.texts`.
        evaluation: another source, which the first must not overlap; empty for none.
        model: whose tokens are counted; empty for none.
        sequence_length: of the sequences that tokens are cut into.

    Raises:
        DataError: a source cannot be read, or holds too little.
        ModelError: there is no such model.
    """
    facts, shares, grams = _of_texts(_some(read_texts(source, split="calibration")))
    if evaluation:
        theirs = set(_grams(_some(read_texts(evaluation, split="evaluation"))))
        shares["overlap"] = len(theirs & grams) / max(1, len(theirs))
    if model:
        facts |= _of_tokens(source, model, sequence_length, shares)
    measures = [_measure(name, share) for name, share in shares.items()]
    return {"source": source, **facts, "measures": measures}


def _of_texts(texts: Iterable[str]) -> tuple[dict[str, Any], dict[str, float], set[int]]:
    seen: set[bytes] = set()
    grams: set[int] = set()
    lengths: Counter[int] = Counter()
    scripts: Counter[str] = Counter()
    count = characters = duplicates = short = broken = control = 0
    for text in texts:
        count, characters = count + 1, characters + len(text)
        lengths[next((b for b in BUCKETS if len(text) < b), 0)] += 1
        key = hashlib.blake2b(" ".join(text.lower().split()).encode(), digest_size=16).digest()
        duplicates += key in seen
        seen.add(key)
        short += len(text) < SHORT
        broken += text.count("\ufffd")
        control += sum(unicodedata.category(c) == "Cc" and c not in "\t\n\r\f" for c in text)
        scripts.update(_script(c) for c in text[:2000] if c.isalpha())
        grams.update(_grams([text]))
    letters = max(1, scripts.total())
    facts = {
        "texts": count,
        "characters": characters,
        "length_histogram": {
            f"< {b}" if b else f">= {BUCKETS[-1]}": lengths[b] for b in (*BUCKETS, 0)
        },
        "scripts": {name: n / letters for name, n in scripts.most_common(5)},
    }
    shares = {
        "duplicates": duplicates / max(1, count),
        "short": short / max(1, count),
        "broken": broken / max(1, characters),
        "control": control / max(1, characters),
    }
    return facts, shares, grams


def _of_tokens(
    source: str, model: str, sequence_length: int, shares: dict[str, float]
) -> dict[str, Any]:  # fmt: skip
    found = resolve_model(model)
    ids = prepare_tokens(
        source,
        split="calibration",
        tokenizer_uri=found.uri,
        vocab_size=2**31,
        sequence_length=sequence_length,
        num_sequences=None,
        bos=True,
        seed=0,
    )
    rows = [row.tobytes() for row in ids]
    shares["repeated sequences"] = 1 - len(set(rows)) / max(1, len(rows))
    first, times = Counter(ids[:, 0].tolist()).most_common(1)[0]
    return {
        "sequences": len(ids),
        "sequence_length": int(ids.shape[1]),
        "tokens": int(ids.size),
        "most_common_first_token": first,
        "share_of_it": times / len(ids),  # 1 where each sequence begins with BOS
    }


def _measure(name: str, share: float) -> Measure:
    warn, fail = LIMITS[name]
    level: Level = "error" if share >= fail else "warning" if share >= warn else "ok"
    fix = "" if level == "ok" else FIXES[name]
    return Measure(name=name, share=share, level=level, meaning=MEANING[name], fix=fix)


def _grams(texts: Iterable[str]) -> Iterator[int]:
    for text in texts:
        words = text.lower().split()
        for start in range(len(words) - GRAM_WORDS + 1):
            yield hash(" ".join(words[start : start + GRAM_WORDS]))


def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").partition(" ")[0].title()


def _some(texts: Iterable[str]) -> Iterator[str]:
    for index, text in enumerate(texts):
        if index == MAX_TEXTS:
            return
        yield text
