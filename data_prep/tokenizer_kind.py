"""Detects the kind of tokenizer at a path, by content.

A separate module: it reads no tokenizer, and recognises the kinds that are not supported.
"""

from pathlib import Path

from data_prep.errors import DataError
from data_prep.lfs import refuse_pointer
from data_prep.special_tokens import MERGES, TOKENIZER, VOCAB, read_json
from data_prep.tokenizer_spec import RANKS_FILE, SPEC_FILE

TAKEN = (
    f"tokenizer.path must be a folder with {RANKS_FILE} and {SPEC_FILE}, Hugging Face's {TOKENIZER} or its folder,"
    " or a .tiktoken file"
)
INSTEAD = "give a byte-level BPE as tokenizer.json, or train one with tokenizer=bpe"


def is_hf(path: Path) -> bool:
    """True if the path is a tokenizer.json of any name, or a folder with one and without a tokenizer of ours.

    Raises DataError if a folder has no tokenizer, or if a file is an LFS pointer or part of another kind of tokenizer.
    """
    if not path.is_dir():
        return path.suffix == ".json" and path.is_file() and isinstance(_kind(path).get("model"), dict)
    if (path / SPEC_FILE).exists() or (path / RANKS_FILE).exists():
        return False
    if (path / TOKENIZER).is_file() or ((path / VOCAB).is_file() and (path / MERGES).is_file()):
        return True
    for file in sorted([*path.glob("*.model"), *path.glob("tekken.json")]):
        raise DataError(f"tokenizer.path={path} has no {TOKENIZER}; {file.name} {other_tokenizer(file) or 'may do'}")
    raise DataError(f"tokenizer.path={path} has none of the files of a tokenizer: {TAKEN}")


def other_tokenizer(path: Path) -> str:
    """Says why a file is not a list of ranks, if its kind is known; else ""."""
    if not path.is_file():
        return ""
    refuse_pointer(path)
    if path.suffix == ".json":
        return _of_json(path)
    if path.name == MERGES:
        return f"is one file of a tokenizer: give its folder, {path.parent}"
    with open(path, "rb") as file:
        start = file.read(64)
    if start[:1] == b"\n" and b"\0" not in start[:1] and len(start) > 2 and start[2:3] == b"\n":
        return f"is a SentencePiece model, which is not supported: {INSTEAD}"
    return ""


def _of_json(path: Path) -> str:
    content = _kind(path)
    if isinstance(content.get("vocab"), list) and "config" in content:
        return f"is Mistral's tekken file, which is not supported: {INSTEAD} (their Hugging Face folders have one)"
    if path.name in (SPEC_FILE, VOCAB) or (path.parent / TOKENIZER).is_file():
        return f"is one file of a tokenizer's folder: give the folder, {path.parent}"
    return f"is not a tokenizer: {TAKEN}"


def _kind(path: Path) -> dict[str, object]:
    refuse_pointer(path)
    return read_json(path)
