"""Tests tokenizers: exact round trips, their files, training, and every way to get one."""

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.bpe import PATTERNS, even_sample, train_bpe
from data_prep.errors import DataError
from data_prep.tokenizer import LONGEST_RUN, FileTokenizer, NamedTokenizer, Tokenizer
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec, format_ranks, read_ranks
from tests.data_prep.commands import python, small_spec, texts

SMALL = Tokenizer(small_spec())
MIB = 1 << 20


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_decoding_inverts_encoding(text: str) -> None:
    ids = SMALL.encode(text)
    assert SMALL.decode(ids) == text and SMALL.decode_bytes(ids) == text.encode()
    assert SMALL.end_of_document not in ids


def test_special_token_in_a_document_is_text() -> None:
    ids = SMALL.encode("a<|endoftext|>b")
    assert SMALL.end_of_document not in ids and SMALL.decode(ids) == "a<|endoftext|>b"


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("character", [" ", "\n", "\u3000", "a", "东", "!", "7", "\x1c"])
def test_million_repeated_characters_round_trip(pattern: str, character: str) -> None:
    tokenizer = Tokenizer(TokenizerSpec("x", PATTERNS[pattern], SMALL.spec.special_tokens, SMALL.spec.ranks))
    text = "the " + character * 1_000_000 + "the"
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 10
    assert tokenizer.decode(ids) == text and np.array_equal(ids, tokenizer.encode(text))


def test_pieces_change_nothing_without_long_runs() -> None:
    text = "".join(texts(100))
    assert len(text) > LONGEST_RUN
    assert np.array_equal(SMALL.encode(text), SMALL._encode(text))


def test_tokenizer_files_round_trip(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.spec == SMALL.spec and loaded.fingerprint == SMALL.fingerprint
    assert loaded.vocab_size == 260 and loaded.end_of_document == 259


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    Tokenizer.load(tmp_path)
    small_spec(("th", "he", "the")).save(tmp_path)
    assert Tokenizer.load(tmp_path).fingerprint != SMALL.fingerprint


def test_fingerprint_depends_on_the_content() -> None:
    spec = small_spec()
    reordered = TokenizerSpec("other", spec.pattern, spec.special_tokens, dict(reversed(spec.ranks.items())))
    assert reordered.fingerprint == spec.fingerprint
    for changed in [
        TokenizerSpec("small", "x", spec.special_tokens, spec.ranks),
        TokenizerSpec("small", spec.pattern, {"<|endoftext|>": 300}, spec.ranks),
    ]:
        assert changed.fingerprint != spec.fingerprint


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    ranks, spec = (tmp_path / "ranks.tiktoken").read_bytes(), (tmp_path / "spec.json").read_bytes()
    for name, content, rule in [
        ("ranks.tiktoken", b"", "is empty"),
        ("ranks.tiktoken", ranks + b"?? 3\n", "line 260"),
        ("ranks.tiktoken", ranks.split(b"\n", 1)[1], "byte 0x00 has no rank"),
        ("ranks.tiktoken", ranks + b"YWI= 259\n", "distinct"),
        ("spec.json", b"{}", "must hold"),
        ("spec.json", spec.replace(b"<|endoftext|>", b"<|end|>"), "is missing"),
        ("spec.json", spec.replace(b"'(?", b"((?"), "small"),
    ]:
        SMALL.save(tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rule):
            Tokenizer.load(tmp_path)


def test_trained_tokenizer_is_deterministic_and_matches_tiktoken() -> None:
    corpus = texts(60)
    first, second = (train_bpe(corpus, 350, PATTERNS["cl100k"], MIB, MIB) for _ in range(2))
    assert first == second and first.vocab_size == 350
    assert first.special_tokens == {"<|endoftext|>": 349}
    assert sorted(first.ranks.values()) == list(range(349))
    tokenizer = Tokenizer(first)
    text = corpus[7]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) < 0.6 * len(text.encode())


def test_small_sample_gives_fewer_rows() -> None:
    assert 257 <= train_bpe(["abab"], 1000, PATTERNS["gpt2"], MIB, MIB).vocab_size < 300


def test_sample_is_even_bounded_and_deterministic() -> None:
    corpus = texts(2000)
    total = sum(len(text.encode()) for text in corpus)
    sample = even_sample(corpus, total // 8, total)
    assert total // 20 < sum(len(text.encode()) for text in sample) <= total // 8
    assert sample == even_sample(iter(corpus), total // 8, total)
    positions = [corpus.index(text) for text in sample]
    assert positions == sorted(positions) and positions[0] < 200 and positions[-1] > 1800
    assert len(even_sample(["ab" * MIB], MIB // 2, 2 * MIB)) >= 1  # one huge document is sampled, too


def test_bare_ranks_need_pattern_and_end(tmp_path: Path) -> None:
    path = tmp_path / "mine.tiktoken"
    path.write_bytes(format_ranks(SMALL.spec.ranks))
    assert read_ranks(path) == SMALL.spec.ranks
    built = FileTokenizer(str(path), "gpt2", 300).build(tuple)
    assert built.end_of_document == 300 and built.vocab_size == 301
    with pytest.raises(ValueError, match=r"tokenizer\.pattern=.*tokenizer\.end_of_document="):
        FileTokenizer(str(path)).build(tuple)


@pytest.mark.parametrize("pattern,lost", [("[a-z]+", r"\\x00"), ("[^z]+", "z"), (r"\S+|[ \n]", r"\\t")])
def test_pattern_that_drops_text_is_refused(pattern: str, lost: str) -> None:
    tokenizer = Tokenizer(replace(SMALL.spec, pattern=pattern))
    with pytest.raises(DataError, match=rf"tokenizer\.pattern=.* must match all text: '{lost}' does not match"):
        tokenizer.check_pattern()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_builtin_patterns_match_all_text(pattern: str) -> None:
    Tokenizer(replace(SMALL.spec, pattern=PATTERNS[pattern])).check_pattern()


@pytest.mark.parametrize(
    ("id", "words"),
    [
        (257, r"must be a free id, but .*x\.tiktoken uses it for b'the'; 259 is free"),
        (-1, r"must be in \[0, 16777216\)"),
        (1 << 24, r"must be in \[0, 16777216\)"),
    ],
)
def test_taken_end_of_document_is_refused(tmp_path: Path, id: int, words: str) -> None:
    (tmp_path / "x.tiktoken").write_bytes(format_ranks(small_spec().ranks))
    with pytest.raises(DataError, match=rf"^tokenizer\.end_of_document={id} {words}"):
        FileTokenizer(str(tmp_path / "x.tiktoken"), "gpt2", id).build(tuple)


@pytest.mark.parametrize("id", [-1, 2**24, 3_000_000_000, 5_000_000_000])
def test_id_out_of_bounds_is_refused(id: int) -> None:
    with pytest.raises(DataError, match=r"distinct, and in \[0, 16777216\)"):
        replace(SMALL.spec, special_tokens={END_OF_DOCUMENT: id})


def test_unreachable_encoding_names_the_files(tmp_path: Path) -> None:
    code = "from data_prep.tokenizer import Tokenizer; Tokenizer.named('gpt2')"
    nowhere = "http://127.0.0.1:9"
    done = python("-c", code, TIKTOKEN_CACHE_DIR=str(tmp_path), HTTPS_PROXY=nowhere, https_proxy=nowhere)
    last = done.stderr.splitlines()[-1]
    assert "tokenizer gpt2 cannot be downloaded" in last
    for name in ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"):
        assert str(tmp_path / name) in last
    assert "tokenizer=file" in last


def test_plugin_encoding_is_found_by_name(tmp_path: Path) -> None:
    """Adds an encoding to the namespace package tiktoken_ext, where tiktoken finds its own, without a network."""
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "tiny.py").write_text(
        "def tiny():\n"
        "    ranks = {bytes([byte]): byte for byte in range(256)}\n"
        "    return dict(name='tiny', pat_str='.', mergeable_ranks=ranks,"
        " special_tokens={'<|endoftext|>': 256})\n"
        "ENCODING_CONSTRUCTORS = {'tiny': tiny}\n"
    )
    code = (
        "from data_prep.tokenizer import Tokenizer\n"
        "tiny = Tokenizer.named('tiny')\n"
        "print(tiny.vocab_size, tiny.encode('ab'))"
    )
    done = python("-c", code, PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ["257", "[97", "98]"], done.stderr


def test_unknown_encoding_lists_known_names() -> None:
    with pytest.raises(ValueError, match=r"must be one of .*cl100k_base"):
        NamedTokenizer("nope").build(tuple)
