"""Tests tokenizer.path= with Hugging Face's tokenizer.json or a folder without weights; refusals name the kind."""

import json
from pathlib import Path

import pytest
import tokenizers

from data_prep.bpe import PATTERNS
from data_prep.errors import DataError
from data_prep.hf_tokenizer import PROBE
from data_prep.tokenizer import FileTokenizer
from pretrain.interop.tokenizer import to_hf
from tests.data_prep.commands import small_spec

TEXTS = (PROBE, "a 12  3b\n 4\t5 six  7", "x" * 40 + "  1", "½² 1 a")
SPLIT = {"type": "Split", "pattern": {"Regex": PATTERNS["cl100k"]}, "behavior": "Removed", "invert": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}
CUT = {"direction": "Right", "max_length": 32, "strategy": "LongestFirst", "stride": 0}
FILL = {
    "strategy": {"Fixed": 2048},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 259,
    "pad_type_id": 0,
    "pad_token": "<|endoftext|>",
}


def written(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    content = to_hf(small_spec(), 48)["tokenizer.json"] | changes
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"truncation": CUT},
        {"padding": FILL},
        {"truncation": CUT | {"max_length": 2}, "padding": FILL},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES | {"use_regex": False}]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, BYTES | {"use_regex": True}]}},
        {"pre_tokenizer": BYTES | {"use_regex": True}},
    ],
    ids=["plain", "truncation", "padding", "both", "olmo2", "digits", "byte level"],
)
def test_tokenizer_json_matches_tokenizers(tmp_path, changes):
    folder = written(tmp_path / "hf", **changes)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_truncation()
    theirs.no_padding()
    for path in (folder, folder / "tokenizer.json"):
        ours = FileTokenizer(str(path)).build(tuple)
        assert ours.end_of_document == 259
        out = tokenizers.Tokenizer.from_str(json.dumps(to_hf(ours.spec, 48)["tokenizer.json"]))
        for text in TEXTS:
            expected = theirs.encode(text, add_special_tokens=False).ids
            assert ours.encode(text).tolist() == expected == out.encode(text, add_special_tokens=False).ids


def test_end_of_document_is_found_or_required(tmp_path):
    token = to_hf(small_spec(), 48)["tokenizer.json"]["added_tokens"][0] | {"content": "<|end|>"}
    folder = written(tmp_path / "hf", added_tokens=[token])
    with pytest.raises(DataError, match=r"give tokenizer\.end_of_document=; its special tokens are 259 <\|end\|>"):
        FileTokenizer(str(folder)).build(tuple)
    assert FileTokenizer(str(folder), end_of_document=259).build(tuple).end_of_document == 259
    for name, content in (
        ("config.json", {"eos_token_id": [259, 3]}),
        ("generation_config.json", {"eos_token_id": 259}),
        ("tokenizer_config.json", {"eos_token": {"content": "<|end|>"}}),
        ("special_tokens_map.json", {"eos_token": "<|end|>"}),
    ):
        (folder / name).write_text(json.dumps(content))
        assert FileTokenizer(str(folder)).build(tuple).end_of_document == 259
        (folder / name).unlink()


@pytest.mark.parametrize(
    "name,content,message",
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "is a SentencePiece model"),
        ("tekken.json", b'{"config": {}, "vocab": []}', "is Mistral's tekken file"),
        ("config.json", b'{"model_type": "llama"}', "is not a tokenizer: tokenizer.path must be"),
        ("vocab.json", b'{"a": 1}', "is one file of a tokenizer's folder: give the folder"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        ("a.tiktoken", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
    ],
)
def test_unsupported_tokenizer_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        FileTokenizer(str(tmp_path / name)).build(tuple)
    assert message in str(error.value) and str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_folder_without_supported_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has none of the files of a tokenizer: tokenizer\.path must be"):
        FileTokenizer(str(tmp_path)).build(tuple)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00")
    with pytest.raises(DataError, match=r"tokenizer\.model is a SentencePiece model"):
        FileTokenizer(str(tmp_path)).build(tuple)
