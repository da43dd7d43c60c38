"""Imports other programs' token files to a folder of ours, and exports a folder of ours.

Both write into OUT.unfinished and rename it at the end: OUT exists with all its files, or not at all.
"""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.durable import durable_folder
from data_prep.errors import DataError
from data_prep.faults import check
from data_prep.formats.layouts import Layout
from data_prep.formats.stream import Tokens, TokenSpan, stream
from data_prep.token_file import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FOLDER,
    Manifest,
    TokenFile,
    TokenFileEntry,
    TokenFileWriter,
)
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_spec import TokenizerSpec
from data_prep.verify import IMPORTED, IMPORTED_SAME, SAMPLE, encodes_to_itself

FILE_TOKENS = 1 << 27  # approximate tokens per file that an import writes
UNENDED = 1000  # tokens to check if no document ends in the first piece
OF_VALIDATION = re.compile(r"(^|[^a-z])val(id|idation)?([^a-z]|$)", re.IGNORECASE)


def import_tokens(layout: Layout, paths: list[Path], val: list[Path], tokenizer: Tokenizer, out: Path) -> Manifest:
    """Imports training files (`paths`) and validation files (`val`), in order. Raises DataError if one is wrong."""
    given = {"train": paths, "val": val}
    files = {split: [_opened(layout, path, tokenizer) for path in given[split]] for split in SPLITS}
    first = next(_pieces(files["train"], tokenizer), None)
    if first is None:
        raise DataError(
            f"in={paths[0]}: the training files have no tokens" if paths else "in= has no file for training"
        )
    _check_tokenizer(first, tokenizer)
    with durable_folder(out) as folder:
        tokenizer.save(folder / TOKENIZER_FOLDER)
        entries = [entry for split in SPLITS for entry in _write(files[split], tokenizer, folder, split)]
        corpus = {
            "kind": IMPORTED,
            "from": layout.name,
            "files": {split: [path.name for path in given[split]] for split in SPLITS},
        }
        manifest = Manifest(FORMAT_VERSION, tokenizer.fingerprint, tokenizer.vocab_size, corpus, {}, tuple(entries))
        manifest.save(folder)
    return manifest


def export_tokens(layout: Layout, folder: Path, out: Path) -> Manifest:
    """Exports a folder; returns its manifest. Raises DataError if it is damaged, or the layout cannot hold its ids."""
    manifest = check(folder)
    name = TokenizerSpec.load(folder / TOKENIZER_FOLDER).name
    with durable_folder(out) as unfinished:
        for split in SPLITS:
            if files := [TokenFile(folder / entry.name) for entry in manifest.split(split)]:
                layout.export(files, unfinished, split, manifest.vocab_size, name)
    return manifest


def is_of_validation(path: Path) -> bool:
    """True if the file's name says validation: val.bin, fineweb_val_000000.bin."""
    return bool(OF_VALIDATION.search(path.name))


def _opened(layout: Layout, path: Path, tokenizer: Tokenizer) -> Tokens:
    if not path.is_file():
        raise DataError(f"{path} is missing")
    tokens = layout.open(path, tokenizer.vocab_size)
    if tokens.ids.dtype.kind not in "iu" or np.iinfo(tokens.ids.dtype).max < tokenizer.vocab_size - 1:
        raise DataError(
            f"{path}: ids of type {tokens.ids.dtype} cannot hold the {tokenizer.vocab_size} rows of tokenizer"
            f" {tokenizer.spec.name}"
        )
    return tokens


def _pieces(files: list[Tokens], tokenizer: Tokenizer) -> Iterator[TokenSpan]:
    """Yields the pieces of the stream that have tokens. Raises DataError if an id is outside the vocabulary."""
    for piece in stream(files, tokenizer.end_of_document):
        if len(piece.ids):
            smallest, largest = int(piece.ids.min()), int(piece.ids.max())
            if smallest < 0 or largest >= tokenizer.vocab_size:
                raise DataError(
                    f"{piece.path}: id {smallest if smallest < 0 else largest} must be in [0, {tokenizer.vocab_size}):"
                    f" the tokens were not made with tokenizer {tokenizer.spec.name}"
                )
            yield piece


def _check_tokenizer(piece: TokenSpan, tokenizer: Tokenizer) -> None:
    """Raises DataError if too few of the first documents, decoded, encode to the same ids."""
    ends = piece.ends[:SAMPLE].tolist()
    documents = [piece.ids[low : high - 1] for low, high in pairwise([0, *ends])] or [piece.ids[:UNENDED]]
    wrong = sum(not encodes_to_itself(ids, tokenizer, cut=not ends) for ids in documents)
    if wrong > len(documents) * (1 - IMPORTED_SAME):
        raise DataError(
            f"{piece.path}: the text of {wrong} of its first {len(documents)} documents encodes to other ids: the"
            f" tokens were not made with tokenizer {tokenizer.spec.name}"
        )


def _write(files: list[Tokens], tokenizer: Tokenizer, folder: Path, split: str) -> Iterator[TokenFileEntry]:
    """Writes token files of about FILE_TOKENS, each with whole documents."""
    bytes_of_ids = tokenizer.spec.bytes_of_ids()
    pieces = _pieces(files, tokenizer)
    piece, number = next(pieces, None), 0
    while piece is not None:
        name, text_bytes = f"{split}-{number:05d}", 0
        with TokenFileWriter(folder / name, tokenizer.vocab_size) as writer:
            while piece is not None:
                full = writer.tokens + len(piece.ids) >= FILE_TOKENS and len(piece.ends)
                cut = int(piece.ends[-1]) if full else len(piece.ids)
                writer.write(piece.ids[:cut], piece.ends.tolist())
                text_bytes += int(bytes_of_ids[piece.ids[:cut]].sum())
                rest = TokenSpan(piece.path, piece.ids[cut:], piece.ends[:0])
                piece = rest if len(rest.ids) else next(pieces, None)
                if full:
                    break
        number += 1
        yield TokenFileEntry(name, split, writer.documents, writer.tokens, text_bytes, writer.largest_id, writer.sha256)
