"""Converts byte-level BPE tokenizers from tiktoken's ranks and pattern to Hugging Face's tokenizer.json.

tiktoken repeatedly merges the neighbouring pair with the lowest rank of its token. Hugging Face merges pairs in the
order of a list. Therefore the list contains every pair that makes a token, ordered by the rank of that token. tiktoken
does not build a word from pairs if the word is a token; `ignore_merges` does the same.
"""

from typing import Any

from data_prep.bpe import characters
from data_prep.hf_tokenizer import pairs, translated
from data_prep.special_tokens import NAMES, TOKENIZER, TOKENIZER_CONFIG, SpecialTokens
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec


def to_hf(spec: TokenizerSpec, context: int, source: SpecialTokens | None = None) -> dict[str, dict[str, Any]]:
    """Returns the contents of the tokenizer files, by name.

    source: special tokens of the model that the run started from; their names and roles are kept. The ids of a text
    equal the spec's, except that names of special tokens in the text become these tokens.
    Raises ValueError if the pattern cannot be converted for `tokenizers`.
    """
    of_byte = characters()
    written = {token: "".join(of_byte[byte] for byte in token) for token in spec.ranks}
    source = source or SpecialTokens()
    taken = set(source.names.values())
    others = {name: id for name, id in spec.special_tokens.items() if id not in taken}
    special = sorted((source.names | others).items(), key=lambda item: item[1])
    try:
        pattern = oniguruma(spec.pattern)
    except ValueError as error:
        raise ValueError(f"tokenizer {spec.name} cannot be converted for transformers: {error}") from error
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **flags} for name, id in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _begins_with(source) if source.adds_bos else None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {written[token]: id for token, id in sorted(spec.ranks.items(), key=lambda item: item[1])},
            "merges": [[written[left], written[right]] for left, right in merges(spec.ranks)],
        },
    }
    named = source.for_tokenizer() if source.names else dict.fromkeys(NAMES[:2], END_OF_DOCUMENT)
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    return {TOKENIZER: tokenizer, TOKENIZER_CONFIG: about}


def _begins_with(source: SpecialTokens) -> dict[str, Any]:
    """Post-processor that puts bos before a text."""
    name = next(name for name, id in source.names.items() if id == source.bos)
    bos, text, other = {"SpecialToken": {"id": name, "type_id": 0}}, _sequence("A", 0), _sequence("B", 1)
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"SpecialToken": {"id": name, "type_id": 1}}, other],
        "special_tokens": {name: {"id": name, "ids": [source.bos], "tokens": [name]}},
    }


def _sequence(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Returns every pair of tokens that makes a token, ordered by the ranks of the token and its two parts."""
    found = [
        (rank, ranks[left], ranks[right], left, right)
        for token, rank in ranks.items()
        for left, right in pairs(token, ranks)
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def oniguruma(pattern: str) -> str:
    """Converts tiktoken's pattern for Oniguruma, the engine of `tokenizers`.

    There, {n,m}+ is a repeated group, not a possessive quantifier, and $ is the end of a line. Raises ValueError if the
    pattern has a feature that is not converted.
    """
    return "".join(translated(pattern, "(?>{}{})", {"$": r"\z"}))
