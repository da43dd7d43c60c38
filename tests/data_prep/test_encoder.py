"""Tests that gigatoken gives tiktoken's ids, or is not used and a line says so."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import encoder
from data_prep.bpe import PATTERNS, train_bpe
from data_prep.encoder import SCHEMES, Encoder, resident_bytes, sample_of, scheme_for
from data_prep.long import LongDocument
from data_prep.source import Document, Rejected
from data_prep.tokenizer import LONGEST_RUN, Tokenizer
from data_prep.tokenizer_spec import TokenizerSpec
from tests.benchmarks.measure import free_at_once
from tests.data_prep.commands import small_spec, texts, tokenize
from tests.ranks import in_fork

HARD = [
    "",
    "a",
    "\r\n\r\n  \t\n x",
    "'LL 'll I'D",
    "x" * 300,
    "０１２ ٣٤٥ ⅷ",
    "e\u0301 \u200d🙂\u2028",
    "<|endoftext|>",
    "\0\x7f",
]


def documents(*more: str) -> list[Document]:
    return [Document(f"a:{number}", text, text.encode()) for number, text in enumerate([*texts(30), *HARD, *more])]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_gigatoken_matches_tiktoken(tmp_path: Path, pattern: str) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(train_bpe(texts(20), 400, PATTERNS[pattern], 1 << 20, 1 << 20))
    tokenizer.save(tmp_path / "tokenizer")
    scheme, why_not = scheme_for(tokenizer, tmp_path, documents())
    assert (scheme, why_not) == (SCHEMES[PATTERNS[pattern]], "")
    for given in (documents(), documents(" " * LONGEST_RUN * 2), []):
        fast = Encoder.load(tmp_path, scheme).encode_all(given)
        assert all(
            np.array_equal(ids, tokenizer.encode(document.text)) for ids, document in zip(fast, given, strict=True)
        )


def grown_by_new_words(folder: Path) -> int:
    """The bytes by which the process grows on 36 MB of distinct words; a full cache would take 300 MB."""
    free_at_once()
    encoder.CACHE_BYTES = 10 << 20
    one, random, before = Encoder.load(folder, SCHEMES[PATTERNS["gpt2"]]), np.random.default_rng(0), 0
    for _ in range(36):
        words = random.integers(ord("a"), ord("p"), (90_000, 12), np.uint8)
        words[:, 0] = ord(" ")
        text = words.tobytes().decode()
        (ids,) = one.encode_all([Document("a", text, text.encode())])
        before = before or resident_bytes()
    assert isinstance(ids, np.ndarray) and Tokenizer.load(folder / "tokenizer").decode(ids) == text
    return resident_bytes() - before


def test_gigatoken_memory_is_bounded(tmp_path: Path) -> None:
    pytest.importorskip("gigatoken")
    Tokenizer(train_bpe(texts(20), 400, PATTERNS["gpt2"], 1 << 20, 1 << 20)).save(tmp_path / "tokenizer")
    assert in_fork(grown_by_new_words, tmp_path) < 50 << 20


def test_gigatoken_is_not_used_if_ids_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(train_bpe(texts(20), 400, PATTERNS["gpt2"], 1 << 20, 1 << 20))
    tokenizer.save(tmp_path / "tokenizer")
    monkeypatch.setitem(SCHEMES, PATTERNS["gpt2"], "gpt4")
    assert scheme_for(tokenizer, tmp_path, documents()) == (
        None,
        "gigatoken is not used: it encodes a:0 differently from tiktoken",
    )
    monkeypatch.setitem(SCHEMES, PATTERNS["gpt2"], "nothing")
    assert scheme_for(tokenizer, tmp_path, documents())[1].startswith("gigatoken is not used: ")


def ranks_that_gigatoken_refuses() -> dict[str, dict[bytes, int]]:
    ranks = train_bpe(texts(20), 400, PATTERNS["cl100k"], 1 << 20, 1 << 20).ranks
    size = len(ranks)
    return {
        "a token that no merge makes": {**ranks, b"zqxjkv": size},
        "merges in another order": {token: id if id < 256 else 255 + size - id for token, id in ranks.items()},
        "ids with a gap": {token: id if id < 300 else id + 5 for token, id in ranks.items()},
    }


@pytest.mark.parametrize("case", ranks_that_gigatoken_refuses())
def test_unsupported_ranks_print_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str], case: str) -> None:
    """A Rust panic writes to the terminal by itself; the command and its workers discard that."""
    pytest.importorskip("gigatoken")
    ranks = ranks_that_gigatoken_refuses()[case]
    spec = TokenizerSpec("x", PATTERNS["cl100k"], {"<|endoftext|>": max(ranks.values()) + 1}, ranks)
    spec.save(tmp_path / "tokenizer")
    words = "gigatoken does not support these ranks: tiktoken is used"
    assert scheme_for(Tokenizer(spec), tmp_path, documents()) == (None, words)
    (tmp_path / "a.txt").write_text("one two three")
    command = ["corpus=files", f"corpus.paths=[{tmp_path / 'a.txt'}]", "tokenizer=file", "val_fraction=0"]
    done = tokenize(*command, f"tokenizer.path={tmp_path / 'tokenizer'}", f"out={tmp_path / 'out'}")
    assert done.returncode == 0 and words in done.stdout.splitlines() and "panicked" not in done.stderr, done
    assert capfd.readouterr().err == ""


def test_panic_in_a_worker_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gigatoken")
    spec = small_spec()
    ranks = {**spec.ranks, b"zqxjkv": max(spec.ranks.values()) + 2}
    replace(spec, pattern=PATTERNS["cl100k"], ranks=ranks).save(tmp_path / "tokenizer")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer")

    class Panics:
        def encode_batch(self, texts: list[bytes], parallel: bool) -> None:
            os.write(2, b"thread '<unnamed>' panicked")
            raise type("PanicException", (BaseException,), {})("no")

    one = Encoder.load(tmp_path, "gpt4")
    one._fast, one._limit = Panics(), 1 << 60
    given = documents()
    found = one.encode_all(given)
    assert all(np.array_equal(ids, tokenizer.encode(document.text)) for ids, document in zip(found, given, strict=True))
    os.write(2, b"heard")
    assert capfd.readouterr().err == "heard"


def test_gigatoken_is_compared_on_the_start_of_long_documents(tmp_path: Path) -> None:
    """Two megabytes are compared, also of one long document; without text to compare gigatoken is not used."""
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(train_bpe(texts(20), 400, PATTERNS["gpt2"], 1 << 20, 1 << 20))
    tokenizer.save(tmp_path / "tokenizer")
    text = " ".join(texts(2000))
    read = []

    def pieces() -> Iterator[str]:
        for start in range(0, len(text), 10_000):
            read.append(start)
            yield text[start : start + 10_000]

    (document,) = sample_of([LongDocument("a", pieces)])
    assert text.startswith(document.text) and len(document.text) > 900_000 and max(read) < 1_100_000 < len(text)
    assert scheme_for(tokenizer, tmp_path, [LongDocument("a", pieces)])[0] == SCHEMES[PATTERNS["gpt2"]]
    many = iter([Document("a", one, one.encode()) for one in ["x" * (1 << 20)] * 5])
    why_not = "gigatoken is not used: without text it cannot be compared with tiktoken"
    assert scheme_for(tokenizer, tmp_path, many) == (None, why_not) and len(list(many)) == 3


def test_document_with_lost_text_is_rejected(tmp_path: Path) -> None:
    """Uses a pattern that matches the whole probe, but not all text."""
    tokenizer = Tokenizer(replace(small_spec(), pattern=r"[^\u4e00]+"))
    tokenizer.check_pattern()
    tokenizer.save(tmp_path / "tokenizer")
    given = documents("ab\u4e00")
    *others, last = Encoder.load(tmp_path, None).encode_all(given)
    assert last == Rejected(given[-1].id, "the tokenizer's pattern drops some of its text")
    assert all(np.array_equal(ids, tokenizer.encode(one.text)) for ids, one in zip(others, given[:-1], strict=True))


def test_gigatoken_is_not_used_for_unknown_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec()
    tokenizer = Tokenizer(TokenizerSpec("x", r"\S+|\s+", spec.special_tokens, spec.ranks))
    monkeypatch.setattr(encoder, "find_spec", lambda name: name)
    assert (
        scheme_for(tokenizer, tmp_path, [])[1] == "gigatoken is not used: it does not support this tokenizer's pattern"
    )
    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    assert scheme_for(tokenizer, tmp_path, []) == (None, "")
