"""gigatoken beside tiktoken: the same ids, or it is left out and a line says so."""

from pathlib import Path

import numpy as np
import pytest

from data_prep import encoder
from data_prep.bpe import PATTERNS, train_bpe
from data_prep.encoder import SCHEMES, Encoder, scheme_for
from data_prep.source import Document
from data_prep.tokenizer import LONGEST_RUN, Tokenizer
from data_prep.tokenizer_spec import TokenizerSpec
from tests.data_prep.commands import small_spec, texts

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
def test_gigatoken_gives_the_same_ids(tmp_path: Path, pattern: str) -> None:
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


def test_gigatoken_is_left_out_where_it_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gigatoken")
    tokenizer = Tokenizer(train_bpe(texts(20), 400, PATTERNS["gpt2"], 1 << 20, 1 << 20))
    tokenizer.save(tmp_path / "tokenizer")
    monkeypatch.setitem(SCHEMES, PATTERNS["gpt2"], "gpt4")
    assert scheme_for(tokenizer, tmp_path, documents()) == (
        None,
        "gigatoken is not used: it encodes a:0 otherwise than tiktoken",
    )
    monkeypatch.setitem(SCHEMES, PATTERNS["gpt2"], "nothing")
    assert scheme_for(tokenizer, tmp_path, documents())[1].startswith("gigatoken is not used: ")


def test_gigatoken_has_no_name_for_every_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec()
    tokenizer = Tokenizer(TokenizerSpec("x", r"\S+|\s+", spec.special_tokens, spec.ranks))
    monkeypatch.setattr(encoder, "find_spec", lambda name: name)
    assert (
        scheme_for(tokenizer, tmp_path, [])[1] == "gigatoken is not used: it has no name for this tokenizer's pattern"
    )
    monkeypatch.setattr(encoder, "find_spec", lambda name: None)
    assert scheme_for(tokenizer, tmp_path, []) == (None, "")
