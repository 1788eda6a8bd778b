"""Tokens: how text is packed, what is taken from files, and what is refused."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from actors.storage.sources import embedded_model
from actors.storage.tokens import (
    MAX_DEFAULT_SEQUENCES,
    TokenFile,
    load_tokenizer,
    pack,
    prepare_tokens,
    token_file,
    tokens_from_parquet,
    tokens_hash,
    tokens_to_parquet,
)
from planners.errors import DataError

TINY = str(embedded_model())
VOCABULARY = 512  # of tiny
BOS = 0
DEFAULTS = {
    "split": "calibration",
    "tokenizer_uri": TINY,
    "vocab_size": VOCABULARY,
    "sequence_length": 16,
    "num_sequences": None,
    "bos": True,
    "seed": 0,
}


def prepare(source, **arguments):
    return prepare_tokens(str(source), **{**DEFAULTS, **arguments})


def refusal(source, **arguments):
    """Return message and hint of the refusal of a source."""
    with pytest.raises(DataError) as caught:
        prepare(source, **arguments)
    return f"{caught.value}; {caught.value.hint}"


def broken(data):
    with pytest.raises(DataError) as caught:
        tokens_from_parquet(data)
    return str(caught.value)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text file whose ids are known, and those ids."""
    path = tmp_path_factory.mktemp("text") / "a.txt"
    words = " ".join(str(number) for number in range(500))
    path.write_text(words)
    return path, load_tokenizer(embedded_model())(words, add_special_tokens=False)["input_ids"]


@pytest.fixture
def stored(tmp_path):
    """Return a function that writes tensors and returns the source that names them."""

    def write(**tensors):
        path = tmp_path / "tokens.safetensors"
        save_file(tensors, path)
        return f"tokens:{path}"

    return write


@pytest.fixture
def tokenizer(tmp_path):
    """A directory with a copy of tiny's tokenizer."""
    path = tmp_path / "tokenizer"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / name, path)
    return path


matrices = st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
    lambda shape: st.lists(
        st.integers(0, 2**31 - 1), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]
    ).map(lambda ids: np.array(ids, dtype=np.int64).reshape(shape))
)


@given(
    num_tokens=st.integers(0, 300),
    sequence_length=st.integers(2, 40),
    num_sequences=st.none() | st.integers(1, 20),
    bos_id=st.none() | st.just(1000),
    seed=st.integers(0, 3),
)
def test_packing_gives_the_asked_shape_or_refuses(
    num_tokens, sequence_length, num_sequences, bos_id, seed
):
    piece = sequence_length - (bos_id is not None)
    arguments = {
        "sequence_length": sequence_length,
        "num_sequences": num_sequences,
        "bos_id": bos_id,
        "seed": seed,
        "where": "text",
    }
    stream = np.arange(num_tokens, dtype=np.int64)
    if num_tokens // piece < (num_sequences or 1):
        with pytest.raises(DataError, match="text: "):
            pack(stream, **arguments)
        return
    packed = pack(stream, **arguments)
    assert packed.shape == (num_sequences or num_tokens // piece, sequence_length)
    assert packed.dtype == np.int64
    body = packed if bos_id is None else packed[:, 1:]
    assert bos_id is None or (packed[:, 0] == bos_id).all()
    assert (np.diff(body, axis=1) == 1).all()  # consecutive tokens of the stream
    assert (body[:, 0] % piece == 0).all()  # pieces share no token
    assert (np.diff(body[:, 0]) > 0).all()  # in order, none twice


@given(matrices)
def test_tokens_survive_storage(tokens):
    again = tokens_from_parquet(tokens_to_parquet(tokens, {"source": "stdlib"}))
    assert again.dtype == np.int64
    assert np.array_equal(again, tokens)


@given(matrices, matrices)
def test_the_hash_tells_tokens_apart(tokens, others):
    assume(tokens.shape != others.shape or not np.array_equal(tokens, others))
    assert tokens_hash(tokens) != tokens_hash(others)
    assert tokens_hash(tokens) == tokens_hash(tokens.copy(order="F"))


def test_the_hash_tells_the_same_ids_in_other_rows_apart():
    tokens = np.arange(12, dtype=np.int64)
    assert tokens_hash(tokens.reshape(3, 4)) != tokens_hash(tokens.reshape(4, 3))


def test_stored_tokens_say_what_they_are():
    tokens = np.arange(12, dtype=np.int64).reshape(3, 4)
    schema = pq.read_schema(pa.BufferReader(tokens_to_parquet(tokens, {"source": "stdlib"})))
    assert schema.metadata[b"source"] == b"stdlib"
    assert schema.metadata[b"sequence_length"] == b"4"
    assert schema.metadata[b"sha256"].decode() == tokens_hash(tokens)
    assert token_file(tokens, "tokens/a.parquet", source="stdlib") == TokenFile(
        path="tokens/a.parquet",
        sha256=tokens_hash(tokens),
        num_sequences=3,
        sequence_length=4,
        source="stdlib",
    )


def test_a_file_that_is_not_stored_tokens_is_refused():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": ["a"]}), sink)
    assert "not written by this program" in broken(sink.getvalue().to_pybytes())
    whole = tokens_to_parquet(np.zeros((3, 4), dtype=np.int64), {})
    for data in (b"", b"no parquet", whole[:-1], whole[:50]):
        assert "not a readable parquet file" in broken(data)


def test_stored_tokens_that_were_changed_are_refused():
    tokens = np.arange(12, dtype=np.int64).reshape(3, 4)
    table = pq.read_table(pa.BufferReader(tokens_to_parquet(tokens, {})))
    for rows, complaint in (
        (table.slice(0, 2), "hash"),
        (table.take([1, 0, 2]), "hash"),
        (table.replace_schema_metadata({"sequence_length": "5"}), "length"),
        (table.replace_schema_metadata({"sequence_length": "4"}), "hash"),
        (table.replace_schema_metadata(None), "not written by this program"),
    ):
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink)
        assert complaint in broken(sink.getvalue().to_pybytes())


def test_text_is_cut_into_consecutive_pieces_after_bos(text):
    path, ids = text
    tokens = prepare(path)
    num_sequences = min(len(ids) // 15, MAX_DEFAULT_SEQUENCES)
    assert tokens.shape == (num_sequences, 16)
    assert (tokens[:, 0] == BOS).all()
    assert tokens[:, 1:].reshape(-1).tolist() == ids[: num_sequences * 15]


def test_text_without_bos_is_tokens_only(text):
    path, ids = text
    assert prepare(path, bos=False).reshape(-1).tolist() == ids[: len(ids) // 16 * 16]


def test_a_tokenizer_without_bos_gives_none(text, tokenizer):
    path, ids = text
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    del config["bos_token"]
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    assert prepare(path, tokenizer_uri=str(tokenizer))[0].tolist() == ids[:16]


def test_texts_follow_each_other_with_nothing_between(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    load = load_tokenizer(embedded_model())
    ids = [load(word, add_special_tokens=False)["input_ids"] for word in ("one", "two")]
    joined = ids[0] + ids[1]
    assert prepare(path, bos=False, sequence_length=len(joined)).tolist() == [joined]


def test_the_seed_decides_which_pieces_are_drawn(text):
    path, _ = text
    everything = prepare(path)
    drawn = [prepare(path, num_sequences=8, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    rows = [everything.tolist().index(row) for row in drawn[0].tolist()]
    assert rows == sorted(set(rows))
    assert rows != list(range(8))


def test_text_gives_at_most_128_sequences_unless_asked(text):
    path, ids = text
    assert len(prepare(path, sequence_length=4)) == MAX_DEFAULT_SEQUENCES
    assert len(prepare(path, sequence_length=4, num_sequences=200)) == 200 < len(ids) // 3


def test_a_long_text_is_not_read_to_its_end(tmp_path, text):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": text[0].read_text() * 500}) + "\n"
    path.write_text(line * 3 + "not read, or it would be refused as no JSON\n")
    assert prepare(path, num_sequences=4).shape == (4, 16)
    assert "is not JSON" in refusal(path, num_sequences=10**6)


def test_the_standard_library_gives_different_tokens_for_each_split():
    calibration = prepare("stdlib", num_sequences=4)
    evaluation = prepare("stdlib", num_sequences=4, split="evaluation")
    assert calibration.shape == evaluation.shape == (4, 16)
    assert not np.array_equal(calibration, evaluation)


def test_too_little_text_is_refused_with_how_much_there_is(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text("x")
    message = refusal(path)
    assert f"{path}: has 1 tokens, but one sequence needs 15" in message
    path, ids = text
    message = refusal(path, num_sequences=1000)
    assert f"has {len(ids) // 15} sequences of 16 tokens, not 1000" in message
    assert f"at most {len(ids) // 15}" in message


def test_empty_text_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("")
    assert f"{path}: contains no text" in refusal(path)


def test_a_sequence_that_predicts_nothing_is_refused(text):
    assert "predicts nothing" in refusal(text[0], sequence_length=1)
    assert "text needs a sequence length" in refusal(text[0], sequence_length=None)


def test_a_tokenizer_larger_than_the_model_is_refused(text):
    message = refusal(text[0], vocab_size=16)
    assert "but the model's ids are 0 to 15" in message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe\x00"),
        ("tokenizer.json", b'{"version": "1.0", "added_tokens": [], "model": {"type": "?"}}'),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        (
            "tokenizer_config.json",
            b'{"tokenizer_class": "A", "auto_map": {"AutoTokenizer": "a.A"}}',
        ),
    ],
)
def test_a_broken_tokenizer_is_refused_by_its_directory(text, tokenizer, name, data):
    if data is None:
        (tokenizer / name).unlink()
    else:
        (tokenizer / name).write_bytes(data)
    message = refusal(text[0], tokenizer_uri=str(tokenizer))
    assert f"{tokenizer}: has no tokenizer that can be loaded: " in message
    assert "\n" not in message


def test_a_directory_that_does_not_exist_is_refused_as_a_tokenizer(text, tmp_path):
    assert "has no tokenizer" in refusal(text[0], tokenizer_uri=str(tmp_path / "missing"))


def test_embedded_tokens_are_those_of_the_package_in_order():
    for split in ("calibration", "evaluation"):
        rows = load_file(embedded_model() / f"{split}.safetensors")["input_ids"]
        arguments = {"split": split, "sequence_length": None}
        assert np.array_equal(prepare("embedded", **arguments), rows)
        assert np.array_equal(prepare("embedded", num_sequences=3, **arguments), rows[:3])
        assert np.array_equal(prepare("embedded", split=split), rows[:, :16])


def test_more_than_is_embedded_is_refused():
    assert "not 512" in refusal("embedded", sequence_length=512)
    assert "use at most" in refusal("embedded", num_sequences=10**6)


def test_embedded_tokens_are_refused_for_another_tokenizer(tokenizer):
    assert prepare("embedded", tokenizer_uri=str(tokenizer)).shape[1] == 16
    words = json.loads((tokenizer / "tokenizer.json").read_text())
    words["model"]["vocab"]["another"] = VOCABULARY
    (tokenizer / "tokenizer.json").write_text(json.dumps(words))
    assert "has a different tokenizer" in refusal("embedded", tokenizer_uri=str(tokenizer))
    (tokenizer / "tokenizer.json").write_text("[]")
    assert "is not a tokenizer" in refusal("embedded", tokenizer_uri=str(tokenizer))


def test_a_file_of_tokens_is_used_exactly_as_it_is(stored):
    rows = np.arange(60, dtype=np.int64).reshape(5, 12)
    source = stored(input_ids=rows)
    arguments = {"tokenizer_uri": "/nowhere", "sequence_length": 4}
    assert np.array_equal(prepare(source, **arguments), rows)
    assert np.array_equal(prepare(source, num_sequences=2, seed=7, **arguments), rows[:2])


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        ({"tokens": np.zeros((2, 4), np.int64)}, "contains the tensors tokens"),
        ({}, "contains the tensors (none)"),
        (
            {"input_ids": np.zeros((2, 4), np.int64), "mask": np.zeros((2, 4), np.int64)},
            "contains the tensors input_ids, mask",
        ),
        ({"input_ids": np.zeros((2, 4), np.int32)}, "input_ids is I32 of shape (2, 4)"),
        ({"input_ids": np.zeros((2, 4), np.float32)}, "input_ids is F32 of shape (2, 4)"),
        ({"input_ids": np.zeros(4, np.int64)}, "input_ids is I64 of shape (4,)"),
        ({"input_ids": np.zeros((1, 2, 4), np.int64)}, "input_ids is I64 of shape (1, 2, 4)"),
        ({"input_ids": np.zeros((0, 4), np.int64)}, "input_ids is I64 of shape (0, 4)"),
        ({"input_ids": np.zeros((2, 1), np.int64)}, "input_ids is I64 of shape (2, 1)"),
    ],
)
def test_another_tensor_than_input_ids_is_refused(stored, tensors, complaint):
    message = refusal(stored(**tensors))
    assert complaint in message
    assert "one int64 tensor input_ids of shape (sequences, tokens)" in message


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 2**40])
def test_ids_outside_the_vocabulary_are_refused(stored, wrong):
    message = refusal(stored(input_ids=np.array([[0, 1], [wrong, 2]], dtype=np.int64)))
    assert f"has token id {wrong}, but the model's ids are 0 to {VOCABULARY - 1}" in message


def test_more_sequences_than_a_file_holds_are_refused(stored):
    message = refusal(stored(input_ids=np.zeros((5, 12), np.int64)), num_sequences=6)
    assert "has 5 sequences of 12 tokens, not 6; use at most 5" in message


def test_a_missing_file_of_tokens_is_refused_by_name(tmp_path):
    missing = tmp_path / "missing.safetensors"
    assert f"{missing}: no such file" in refusal(f"tokens:{missing}")
    assert f"{tmp_path}: is not a file" in refusal(f"tokens:{tmp_path}")
    assert "is not a file" in refusal("tokens:")


def test_a_broken_file_of_tokens_is_refused_by_name(stored, tmp_path):
    stored(input_ids=np.zeros((5, 12), np.int64))
    path = tmp_path / "tokens.safetensors"
    whole = path.read_bytes()
    for data in (b"", b"\xff" * 100, whole[:-1], whole[:20], whole + b"x"):
        path.write_bytes(data)
        assert f"{path}: is not a readable .safetensors file" in refusal(f"tokens:{path}")


def test_a_tokenizer_model_alone_gives_the_ids_of_sentencepiece_itself(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece", reason="an extra that is not installed")
    lines = [f"the {n} dogs of number {n * n} ran {'very ' * (n % 3)}far" for n in range(400)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "train.txt"), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    own = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    loaded = load_tokenizer(tmp_path)
    assert loaded.bos_token_id == own.bos_id()
    for line in [*lines, "caf\u00e9 \u2603 dogs"]:
        assert loaded(line, add_special_tokens=False)["input_ids"] == own.encode(line)
