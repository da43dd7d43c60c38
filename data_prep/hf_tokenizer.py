"""Converts Hugging Face's tokenizer.json to ranks and a split pattern.

A separate module, so that only tokenising and Hugging Face models import `tokenizers`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.bpe import PATTERNS, characters
from data_prep.errors import DataError, headline
from data_prep.special_tokens import MERGES, TOKENIZER, VOCAB, SpecialTokens, read_json
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec

# Single digits, and GPT-2's pattern on the text between them: a run of spaces before a digit is not split.
DIGITS_THEN_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
PARTS = re.compile(  # the parts of a pattern: escapes, classes, counts, single characters
    r"\\[pPx]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{\d+(?:,\d*)?\}\+?|.", re.DOTALL
)
FLAGS = re.compile(r"\(\?(?!i:|i\))[a-zA-Z-]+[:)]")
PROBE = (  # text that two regex engines may split differently; it must be in NFC
    "Hello World's HOUSE'S it's we'LL they've 1234567 3.14 a1b22c333 x_y  two   three\t\ttabs \n\n lines\r\n end  \n"
    "\n  in.\n\tdef f(a, b): return a+b # ¿qué? Zürich ÉCOLE straße 東京都 привет مرحبا ١٢٣ ½ ² 🙂🙂"
    " <a>&b; 'S ''s $x^y ab aab\naa\n^aa aa$ \u00a0\u3000\u2028 end \x00\x7f!?...---"
)


def from_hf(path: Path, end: int | None = None) -> TokenizerSpec:
    """Converts the tokenizer of a folder, or a tokenizer.json. end: the id that ends a document, if the files do not
    name it (`SpecialTokens.end_of_document`).

    Qwen's tokenizer normalises text to NFC first; that step is left out, so text that is not in NFC gets other ids.
    Raises DataError if there is no tokenizer, or if tiktoken cannot represent it. It must be a byte-level BPE whose ids
    are in the order of its merges, every token must come from merges, and both must give the same ids for a test text.
    """
    folder, file = (path.parent, path) if path.is_file() else (path, path / TOKENIZER)
    try:
        spec = _converted(folder, file, SpecialTokens.read(folder, file), end)
        if file.is_file():
            _check_alike(spec, file)
        return spec
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(f"{path}: the tokenizer's files are incomplete: {headline(error)}") from error


def _converted(folder: Path, file: Path, known: SpecialTokens, end: int | None) -> TokenizerSpec:
    model, splitter, added = _read(folder, file)
    of_character = {character: byte for byte, character in characters().items()}
    special = {token["content"]: token["id"] for token in added}
    try:
        ranks = {
            bytes(of_character[c] for c in token): id for token, id in model["vocab"].items() if token not in special
        }
    except KeyError as error:
        raise DataError(f"{folder}: its tokens are not byte-level: {error.args[0]!r} is not a byte") from None
    order = []
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        order.append(model["vocab"].get(left + right, -1))
    if order != sorted(order) or -1 in order:
        raise DataError(f"{folder}: the ids of its tokens are not in the order of its merges, as tiktoken's ranks are")
    made = set(order)
    for token, id in ranks.items():  # tiktoken uses a word that is a token at once, and merges any pair that is one
        alike = model.get("ignore_merges") and not any(pairs(token, ranks))
        if len(token) > 1 and id not in made and not alike:
            raise DataError(
                f"{folder}: its token {token!r} is not the result of a merge, but tiktoken would produce it"
            )
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise DataError(f"{folder}: its {key}={model[key]!r} must be null: tiktoken has no {key}")
    for word in added:
        name = word["content"]
        if not word.get("special", True) and not (name.startswith("<") and name.endswith(">")):
            raise DataError(
                f"{folder}: {name!r} is an added token, matched anywhere in a text; tiktoken's ranks cannot be"
            )
    name = folder.resolve().name if file.name == TOKENIZER else file.stem
    try:
        return TokenizerSpec(name, splitter, _with_end(folder, special, known.end_of_document, end), ranks)
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error


def _with_end(folder: Path, special: dict[str, int], found: int | None, given: int | None) -> dict[str, int]:
    """The special tokens. The one that ends a document gets our name, <|endoftext|>."""
    named = special.get(END_OF_DOCUMENT)
    if named is not None:
        if given not in (None, named):
            raise DataError(f"{folder}: {END_OF_DOCUMENT} ends a document, with id {named}: it cannot be {given}")
        return special
    end = found if given is None else given
    if end is None:
        listed = ", ".join(f"{id} {name}" for name, id in list(special.items())[:8])
        raise DataError(
            f"{folder}: special token {END_OF_DOCUMENT} is missing, and no config.json says which id ends a text: give"
            f" tokenizer.end_of_document=; its special tokens are {listed or 'none'}"
        )
    return {END_OF_DOCUMENT: end} | {name: id for name, id in special.items() if id != end}


def _check_alike(spec: TokenizerSpec, path: Path) -> None:
    """Raises ValueError if `tokenizers` does not encode each token's text to that token, or the probe to the same ids.

    Other texts are not checked.
    """
    import tokenizers

    try:
        theirs = tokenizers.Tokenizer.from_file(str(path))
        theirs.no_truncation()  # truncation and padding are saved as last used
        theirs.no_padding()
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"{path} cannot be read: {headline(error)}") from error
    of_byte = characters()
    for token, id in spec.ranks.items():
        made = theirs.model.tokenize("".join(of_byte[byte] for byte in token))
        if [part.id for part in made] != [id]:
            raise DataError(f"{path}: its merges do not produce its token {token!r}, but tiktoken would")
    try:
        tokenizer = Tokenizer(spec)
        ours = tokenizer.encode(PROBE)
    except Exception as error:  # tiktoken raises ValueError on a pattern, and Rust may panic
        raise DataError(f"{path}: tiktoken cannot use its pattern: {headline(error)}") from error
    if ours.tolist() != theirs.encode(PROBE, add_special_tokens=False).ids:
        raise DataError(f"{path} splits text in a way that tiktoken cannot: both give different ids for the same text")
    if tokenizer.decode(ours) != PROBE:
        raise DataError(f"{path}: its pattern does not match all text, so some text would be lost")


def _read(folder: Path, file: Path) -> tuple[dict[str, Any], str, list[dict[str, Any]]]:
    """Reads model, split pattern and added tokens from tokenizer.json, or from GPT-2's two files."""
    if not file.is_file():
        if not ((folder / VOCAB).is_file() and (folder / MERGES).is_file()):
            raise DataError(f"{file} is missing")
        lines = (folder / MERGES).read_text(encoding="utf-8").splitlines()
        model: dict[str, Any] = {
            "vocab": read_json(folder / VOCAB),
            "merges": [x for x in lines if x and x[:8] != "#version"],
        }
        end = model["vocab"].get(END_OF_DOCUMENT)
        return model, PATTERNS["gpt2"], [] if end is None else [{"content": END_OF_DOCUMENT, "id": end}]
    content = read_json(file)
    try:
        model, steps = content["model"], content["pre_tokenizer"]
        kind, added = model["type"], content.get("added_tokens") or []
        steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
        kinds = [step["type"] for step in steps]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is not a tokenizer of bytes") from error
    if kind != "BPE" or kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        raise DataError(f"{file} is not a byte-level BPE")
    if (content.get("normalizer") or {"type": "NFC"})["type"] != "NFC":
        raise DataError(f"{file} normalises text before it splits it ({content['normalizer']['type']})")
    try:
        return model, _pattern(steps), added
    except ValueError as error:
        raise DataError(f"{file}: {error}") from error


def _pattern(steps: list[dict[str, Any]]) -> str:
    """The one pattern that splits as these steps do; the last step is ByteLevel. Raises ValueError if there is none."""
    kinds, again = [step["type"] for step in steps], steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and again:
        return PATTERNS["gpt2"]
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and again:
        return DIGITS_THEN_GPT2
    # tiktoken keeps only the matches; Isolated also keeps the text between them. `_check_alike` fails if there is any.
    kept = [(step.get("behavior"), bool(step.get("invert"))) for step in steps[:1]]
    matches = kept in ([("Isolated", False)], [("Isolated", True)], [("Removed", True)])
    if kinds == ["Split", "ByteLevel"] and matches and not again and "Regex" in steps[0]["pattern"]:
        return _rust(steps[0]["pattern"]["Regex"])
    description = ", then ".join([*kinds[:-1], f"ByteLevel with use_regex={str(again).lower()}"])
    raise DataError(f"splits text in several steps, but tiktoken has one pattern: {description}")


def pairs(token: bytes, ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yields every pair of tokens that together make the token."""
    for cut in range(1, len(token)):
        if token[:cut] in ranks and token[cut:] in ranks:
            yield token[:cut], token[cut:]


def _rust(pattern: str) -> str:
    """Translates Oniguruma's pattern for tiktoken, where {n,m}+ is possessive. Raises DataError if it cannot."""
    return "".join(translated(pattern, "(?:{}{})+", {}))


def translated(pattern: str, counted: str, ends: dict[str, str]) -> list[str]:
    """A pattern's parts for the other engine. counted: what `part{n,m}+` becomes. ends: what $ becomes, if it is
    allowed.
    """
    parts: list[str] = []
    for part in PARTS.findall(pattern):
        if part[0] == "{" and part[-1] == "+":
            if not parts or parts[-1] in ("(", ")", "|", "?", "*", "+"):
                raise DataError(f"the pattern has {part} after a group, which the two regex engines read differently")
            parts.append(counted.format(parts.pop(), part[:-1]))
        elif part == "^" or (part == "$" and part not in ends):
            raise DataError(f"the pattern has {part}, which the two regex engines read differently")
        else:
            parts.append(ends.get(part, part))
    if flags := FLAGS.search("".join(part for part in PARTS.findall(pattern) if len(part) == 1)):
        raise DataError(f"the pattern has {flags.group()}, which the two regex engines read differently")
    return parts
