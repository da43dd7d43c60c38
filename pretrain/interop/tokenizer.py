"""Tokenizers of byte-level BPE: tiktoken's ranks and pattern, and Hugging Face's tokenizer.json.

tiktoken joins, of all neighbours that make a token, the pair whose token has the lowest rank. Hugging Face joins pairs
by a list. So the list has every pair that makes a token, in the order of the tokens' ranks; and, as tiktoken does, a
word that is a token is not built up from pairs (`ignore_merges`).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.bpe import PATTERNS, characters
from data_prep.errors import DataError, headline
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
PARTS = re.compile(  # of a pattern: escapes, classes, counts, single characters
    r"\\[pPx]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d+(?:,\d*)?\}\+?|.", re.DOTALL
)
FLAGS = re.compile(r"\(\?(?!i:|i\))[a-zA-Z-]+[:)]")
PROBE = (  # what two engines may split in two ways; must stay as it is in NFC
    "Hello World's HOUSE'S it's we'LL they've 1234567 3.14 a1b22c333 x_y  two   three\t\ttabs \n\n lines\r\n end  \n"
    "\n  in.\n\tdef f(a, b): return a+b # ¿qué? Zürich ÉCOLE straße 東京都 привет مرحبا ١٢٣ ½ ² 🙂🙂"
    " <a>&b; 'S ''s $x^y ab aab\naa\n^aa aa$ \u00a0\u3000\u2028 end \x00\x7f!?...---"
)


def to_hf(spec: TokenizerSpec, context: int) -> dict[str, dict[str, Any]]:
    """The files, by name. Their ids for a text are those of the spec, except that they take special tokens' names in a
    text for the tokens. ValueError where its pattern cannot be written for `tokenizers`.
    """
    of_byte = characters()
    written = {token: "".join(of_byte[byte] for byte in token) for token in spec.ranks}
    special = sorted(spec.special_tokens.items(), key=lambda item: item[1])
    try:
        pattern = oniguruma(spec.pattern)
    except ValueError as error:
        raise ValueError(f"tokenizer {spec.name} cannot be written for transformers: {error}") from error
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
        "post_processor": None,
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
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_DOCUMENT,
        "eos_token": END_OF_DOCUMENT,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    return {TOKENIZER: tokenizer, TOKENIZER_CONFIG: about}


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, by the rank of what it makes, then of its parts."""
    found = [
        (rank, ranks[left], ranks[right], left, right)
        for token, rank in ranks.items()
        for left, right in _pairs(token, ranks)
    ]
    return [(left, right) for *_, left, right in sorted(found)]


def _pairs(token: bytes, ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    for cut in range(1, len(token)):
        if token[:cut] in ranks and token[cut:] in ranks:
            yield token[:cut], token[cut:]


def oniguruma(pattern: str) -> str:
    """tiktoken's pattern for the engine of `tokenizers`, to which {n,m}+ is a repetition, and $ the end of a line.

    ValueError where it has what is not translated.
    """
    return "".join(_translated(pattern, "(?>{}{})", {"$": r"\z"}))


def _rust(pattern: str) -> str:
    """The other way: {n,m}+ is to repeat. ValueError as above, and on $."""
    return "".join(_translated(pattern, "(?:{}{})+", {}))


def _translated(pattern: str, counted: str, ends: dict[str, str]) -> list[str]:
    parts: list[str] = []
    for part in PARTS.findall(pattern):
        if part[0] == "{" and part[-1] == "+":
            if not parts or parts[-1] in ("(", ")", "|", "?", "*", "+"):
                raise ValueError(f"the pattern has {part} after a group, which the other engine reads otherwise")
            parts.append(counted.format(parts.pop(), part[:-1]))
        elif part == "^" or (part == "$" and part not in ends):
            raise ValueError(f"the pattern has {part}, which the other engine reads otherwise")
        else:
            parts.append(ends.get(part, part))
    if flags := FLAGS.search("".join(part for part in PARTS.findall(pattern) if len(part) == 1)):
        raise ValueError(f"the pattern has {flags.group()}, which the other engine reads otherwise")
    return parts


def from_hf(folder: Path, eos: int | None) -> TokenizerSpec:
    """The folder's tokenizer as ours. `eos`: the id that ends a document where no token is called so.

    NFC, to which Qwen's brings a text before it splits it, is left out: a text that is not NFC gets other ids.
    ValueError where there is none, or one that is not tiktoken's kind: of bytes, ids in the order of its merges, all
    of them made by merges, and no words beside them; and where the two give other ids for a text of many kinds.
    """
    try:
        spec = _converted(folder, eos)
        if (folder / TOKENIZER).is_file():
            _check_alike(spec, folder / TOKENIZER)
        return spec
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{folder}: its tokenizer's files lack something: {headline(error)}") from error


def _converted(folder: Path, eos: int | None) -> TokenizerSpec:
    model, splitter, added = _read(folder)
    of_character = {character: byte for byte, character in characters().items()}
    special = {token["content"]: token["id"] for token in added}
    try:
        ranks = {
            bytes(of_character[c] for c in token): id for token, id in model["vocab"].items() if token not in special
        }
    except KeyError as error:
        raise ValueError(f"{folder}: its tokens are not of bytes: {error.args[0]!r} is none") from None
    order = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        order.append(model["vocab"].get(left + right, -1))
    if order != sorted(order) or -1 in order:
        raise ValueError(f"{folder}: the ids of its tokens are not in the order of its merges, as tiktoken's ranks are")
    made = set(order)
    for token, id in ranks.items():  # tiktoken takes a word that is a token, and joins all pairs that are
        alike = model.get("ignore_merges") and not any(_pairs(token, ranks))
        if len(token) > 1 and id not in made and not alike:
            raise ValueError(f"{folder}: no merge makes its token {token!r}, which tiktoken would make")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{folder}: its {key} is {model[key]!r}, and must be null: tiktoken has none")
    for word in added:
        name = word["content"]
        if not word.get("special", True) and not (name.startswith("<") and name.endswith(">")):
            raise ValueError(f"{folder}: {name!r} is a token wherever it stands, which tiktoken's ranks cannot say")
    if END_OF_DOCUMENT not in special:
        special = {(END_OF_DOCUMENT if id == eos else name): id for name, id in special.items()}
    try:
        return TokenizerSpec(folder.resolve().name, splitter, special, ranks)
    except DataError as error:
        raise ValueError(f"{folder}: {error}") from error


def _check_alike(spec: TokenizerSpec, path: Path) -> None:
    """ValueError where `tokenizers` does not make a token of its text, or other ids of the probe.

    It proves nothing of other texts.
    """
    import tokenizers

    try:
        theirs = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path} cannot be read: {headline(error)}") from error
    of_byte = characters()
    for token, id in spec.ranks.items():
        made = theirs.model.tokenize("".join(of_byte[byte] for byte in token))
        if [part.id for part in made] != [id]:
            raise ValueError(f"{path}: its merges do not make its token {token!r}, which tiktoken would make")
    try:
        ours = Tokenizer(spec).encode(PROBE)
    except Exception as error:  # tiktoken raises ValueError on a pattern, and Rust may panic
        raise ValueError(f"{path}: its pattern is none for tiktoken: {headline(error)}") from error
    if ours.tolist() != theirs.encode(PROBE, add_special_tokens=False).ids:
        raise ValueError(f"{path} splits text as tiktoken cannot: it has other ids for a text that both were given")


def _read(folder: Path) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    """Model, split pattern and added tokens of tokenizer.json, or of GPT-2's two files."""
    path = folder / TOKENIZER
    if not path.is_file():
        vocab, listed = folder / "vocab.json", folder / "merges.txt"
        if not (vocab.is_file() and listed.is_file()):
            raise ValueError(f"{path} is missing")
        lines = listed.read_text().splitlines()
        model = {"vocab": json.loads(vocab.read_bytes()), "merges": [x for x in lines if x and x[:8] != "#version"]}
        end = model["vocab"].get(END_OF_DOCUMENT)
        return model, PATTERNS["gpt2"], [] if end is None else [{"content": END_OF_DOCUMENT, "id": end}]
    try:
        content = json.loads(path.read_bytes())
        model, steps = content["model"], content["pre_tokenizer"]
        kind, added = model["type"], content.get("added_tokens") or []
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        kinds = [step["type"] for step in steps]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a tokenizer of bytes") from error
    if kind != "BPE" or kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        raise ValueError(f"{path} is not a byte-level BPE")
    if (content.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise ValueError(f"{path} normalises text before it splits it ({content['normalizer']['type']})")
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return model, PATTERNS["gpt2"], added
    plain = kinds == ["Split", "ByteLevel"] and "Regex" in steps[0]["pattern"] and steps[0]["behavior"] == "Isolated"
    if not plain or steps[0].get("invert") or steps[1].get("use_regex", True):
        raise ValueError(f"{path} splits text as tiktoken cannot")
    try:
        return model, _rust(steps[0]["pattern"]["Regex"]), added
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
