"""A tiktoken tokenizer and its tokenizer.json give equal ids: on code, on every character, on any short text."""

import json
import sys
import sysconfig
import unicodedata
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.bpe import PATTERNS, train_bpe
from data_prep.hf_tokenizer import from_hf
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec
from pretrain.interop.tokenizer import merges, oniguruma, to_hf

CL100K_NOW = (  # as in current tiktoken
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"
    r"|\s+(?!\S)|\s"
)
O200K = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
SPLITS = {**PATTERNS, "cl100k now": CL100K_NOW, "o200k": O200K}


def code(megabytes: float) -> list[str]:
    """Source files of the standard library."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text(errors="replace")
        texts.append(text)
        size += len(text)
        if size > megabytes * 1e6:
            break
    return texts


@pytest.fixture(scope="module")
def pairs():
    """Our tokenizer and the converted one, for each pattern."""
    texts = [*code(0.5), "Zürich 东京 naïve ｆｕｌｌ １２３４ 🙂🙂 it's IT'S \r\n\t  x " * 20]
    made = {}
    for name, pattern in SPLITS.items():
        spec = train_bpe(texts, 1500, pattern, 1 << 20, 1 << 22)
        made[name] = Tokenizer(spec), tokenizers.Tokenizer.from_str(json.dumps(to_hf(spec, 8)["tokenizer.json"]))
    return made


def same(pair, text: str) -> None:
    ours, theirs = pair
    assert theirs.encode(text, add_special_tokens=False).ids == ours.encode(text).tolist(), text[:100]


@pytest.mark.parametrize("name", SPLITS)
def test_ids_match_on_code_and_decode(pairs, name):
    ours, theirs = pairs[name]
    for text in code(1):
        if END_OF_DOCUMENT not in text:
            same((ours, theirs), text)
    text = "Zürich 东京 🙂 it's\n"
    assert theirs.decode(theirs.encode(text).ids) == text


@pytest.mark.parametrize("name", SPLITS)
def test_ids_match_around_every_character(pairs, name):
    """Compares case folding, classes and spaces of two regex engines. Tests every 97th ideograph."""
    points = [
        point
        for point in range(sys.maxunicode + 1)
        if unicodedata.category(chr(point)) not in ("Cs", "Cn", "Co") and (point < 0x3400 or point % 97 == 0)
    ]
    ours, theirs = pairs[name]
    for start in range(0, len(points), 4096):
        texts = [f"a{c}b '{c} 1{c}{c} {c}\n" for c in map(chr, points[start : start + 4096])]
        for text, found in zip(texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True):
            assert found.ids == ours.encode(text).tolist(), ascii(text)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab '\n\r\tsS1２é\u0301東🙂.\u00a0\u3000"), max_size=40))
def test_ids_match_on_generated_texts(pairs, text):
    for pair in pairs.values():
        same(pair, text)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.text(alphabet="ab", min_size=2, max_size=5), max_size=12), st.text(alphabet="ab", max_size=30))
def test_any_ranks_match_tiktoken(words, text):
    """Uses ranks that no training would produce: tokens without parts, or with several decompositions."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {word.encode(): 256 + i for i, word in enumerate(sorted(words))}
    spec = TokenizerSpec("any", PATTERNS["gpt2"], {END_OF_DOCUMENT: len(ranks)}, ranks)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(to_hf(spec, 8)["tokenizer.json"]))
    same((Tokenizer(spec), theirs), text)


def test_special_tokens_and_merges_are_written():
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257, b"abc": 258}
    spec = TokenizerSpec("x", PATTERNS["gpt2"], {END_OF_DOCUMENT: 260, "<|pad|>": 259}, ranks)
    assert merges(ranks) == [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc"), (b"ab", b"c")]
    files = to_hf(spec, 77)
    theirs = tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    assert theirs.encode(f"abc<|pad|>{END_OF_DOCUMENT}").ids == [258, 259, 260] and theirs.get_vocab_size() == 261
    assert files["tokenizer_config.json"]["model_max_length"] == 77


def test_patterns_are_converted_for_oniguruma():
    assert oniguruma(r"\p{N}{1,3}+| ?[^\s\p{L}]++|\s++$") == r"(?>\p{N}{1,3})| ?[^\s\p{L}]++|\s++\z"
    assert oniguruma(PATTERNS["cl100k"]) == PATTERNS["cl100k"]
    assert oniguruma(r"\P{N}{1,3}+|[$€]|\x{41}{2}+|\$") == r"(?>\P{N}{1,3})|[$€]|(?>\x{41}{2})|\$"


@pytest.mark.parametrize("pattern", ["(?:ab){1,2}+|.", "^aa|.", "(?s:.)+"])
def test_unconvertible_pattern_raises(pattern):
    spec = TokenizerSpec("x", pattern, {END_OF_DOCUMENT: 256}, {bytes([byte]): byte for byte in range(256)})
    with pytest.raises(ValueError, match="tokenizer x cannot be converted for transformers"):
        to_hf(spec, 8)


@pytest.mark.parametrize("name", SPLITS)
def test_import_restores_exported_tokenizer(pairs, name, tmp_path):
    spec = pairs[name][0].spec
    write(tmp_path, to_hf(spec, 8))
    back = from_hf(tmp_path, None)
    assert back.ranks == spec.ranks and back.special_tokens == spec.special_tokens
    for text in code(0.2):
        assert (Tokenizer(back).encode(text) == pairs[name][0].encode(text)).all()


def write(folder: Path, files: dict) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def test_vocab_and_merges_files_are_read(tmp_path):
    """Reads vocab.json and merges.txt of old folders, and tokenizer.json with ByteLevel's default pattern."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(code(0.3), 600, special_tokens=[], show_progress=False)
    end = trained.get_vocab_size()
    trained.add_special_tokens([END_OF_DOCUMENT])
    trained.save_model(str(tmp_path))
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(vocab | {END_OF_DOCUMENT: end}))
    old = from_hf(tmp_path, None)
    trained.save(str(tmp_path / "tokenizer.json"))
    new = from_hf(tmp_path, None)
    assert old.ranks == new.ranks and old.end_of_document == new.end_of_document == end
    for text in code(0.3):
        assert Tokenizer(old).encode(text).tolist() == trained.encode(text).ids


def test_end_of_document_may_have_another_name(tmp_path):
    spec = TokenizerSpec("x", PATTERNS["gpt2"], {END_OF_DOCUMENT: 256}, {bytes([byte]): byte for byte in range(256)})
    files = to_hf(spec, 8)
    files["tokenizer.json"]["added_tokens"][0]["content"] = "<|end_of_text|>"
    write(tmp_path, files)
    assert from_hf(tmp_path, 256).special_tokens == {END_OF_DOCUMENT: 256}
    with pytest.raises(ValueError, match=r"endoftext.*is missing"):
        from_hf(tmp_path, None)


SPLIT = {"type": "Split", "pattern": {"Regex": " ?[a-z]+"}, "behavior": "Isolated"}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}  # use_regex is true by default
BYTES_ALONE = BYTES | {"use_regex": False}


@pytest.mark.parametrize(
    "change,message",
    [
        ({"normalizer": {"type": "NFKC"}}, "normalises text before it splits it (NFKC)"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "is not a byte-level BPE"),
        ({"pre_tokenizer": None}, "is not a tokenizer of bytes"),
        ({"vocab": {"▁the": 400}}, "its tokens are not byte-level: '▁' is not a byte"),
        ({"merges": [["b", "c"], ["a", "b"]]}, "not in the order of its merges"),
        ({"merges": [["a", "b"]]}, "its token b'bc' is not the result of a merge"),
        ({"merges": None}, "the tokenizer's files are incomplete"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}}, "splits text in several steps"),
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"invert": True}, BYTES_ALONE]}},
            "splits text in a way that tiktoken cannot",
        ),
        ({"added_tokens": [{"id": 258, "content": "    ", "special": False}]}, "'    ' is an added token"),
        ({"end_of_word_suffix": "</w>"}, "its end_of_word_suffix='</w>' must be null"),
        (
            {"vocab": {"abc": 259}, "merges": [["a", "b"], ["b", "c"], ["a", "bc"]], "ignore_merges": False},
            "its merges do not produce its token b'abc'",
        ),
        ({"pattern": r"^aa|[\s\S]"}, "the pattern has ^, which the two regex engines read differently"),
        ({"pattern": r"[\s\S]+?$"}, "the pattern has $, which"),
        ({"pattern": r"(?m:.)+|\s"}, "the pattern has (?m:, which"),
        ({"pattern": r"\p{L}+"}, "both give different ids for the same text"),  # tiktoken drops the rest
    ],
)
def test_unsupported_tokenizer_raises(tmp_path, change, message):
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256, b"bc": 257}
    files = to_hf(TokenizerSpec("x", PATTERNS["gpt2"], {END_OF_DOCUMENT: 258}, ranks), 8)
    model = files["tokenizer.json"]["model"]
    change = dict(change)
    model["vocab"] |= change.pop("vocab", {})
    model |= {key: change.pop(key) for key in model.keys() & change.keys()}
    if "pattern" in change:
        files["tokenizer.json"]["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": change.pop("pattern")}
    write(tmp_path, files | {"tokenizer.json": files["tokenizer.json"] | change})
    with pytest.raises(ValueError) as error:
        from_hf(tmp_path, None)
    assert message in str(error.value)
