"""Checks a folder of token files against its manifest. Reads everything, in pieces, with one thread per core.

Checks for each token file: sha256, sizes and type, a rising index, counts, the largest id, the bytes of its text, an
end-of-document id after each document, and a sample of documents that must encode to the same ids again.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data_prep.clean import digest_faults
from data_prep.durable import sha256_of
from data_prep.errors import DataError
from data_prep.faults import cheap_faults, or_unreadable
from data_prep.progress import progress
from data_prep.token_file import PIECE, TOKENIZER_FOLDER, Manifest, TokenFile, TokenFileEntry, with_suffix
from data_prep.tokenizer import Tokenizer

SAMPLE = 8  # documents per token file that are decoded
SAMPLE_TOKENS = 1 << 14  # tokens decoded per document: less text than the pieces in which long documents are encoded
IMPORTED = "imported"  # kind of a corpus that another program tokenised, perhaps slightly differently
IMPORTED_SAME = 0.5  # share of an imported sample that must encode to the same ids


def verify(folder: Path) -> list[str]:
    """Lists every fault of the folder, one line each; an empty list if there is none."""
    folder = Path(folder)
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        return [str(error)]
    faults = [*cheap_faults(folder, manifest), *or_unreadable(folder, digest_faults(folder, manifest))]
    checker = _Checker(folder, manifest)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found in progress(pool.map(checker.all_faults, manifest.files), "verify", len(manifest.files)):
            faults += found
    return list(dict.fromkeys(faults))  # a missing file is found twice


class _Checker:
    """Checks the files. If the tokenizer is wrong (a fault by itself), the checks that need it are skipped."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        try:
            tokenizer = Tokenizer.load(folder / TOKENIZER_FOLDER)
        except (DataError, OSError):
            tokenizer = None
        expected = manifest.tokenizer_fingerprint, manifest.vocab_size
        ours = tokenizer is not None and (tokenizer.fingerprint, tokenizer.vocab_size) == expected
        self.tokenizer = tokenizer if ours else None
        self.bytes_of_ids = self.tokenizer.spec.bytes_of_ids() if self.tokenizer else None

    def all_faults(self, entry: TokenFileEntry) -> list[str]:
        prefix = self.folder / entry.name
        return list(or_unreadable(prefix, self._faults(prefix, entry)))

    def _faults(self, prefix: Path, entry: TokenFileEntry) -> Iterator[str]:
        for suffix, expected in entry.sha256.items():
            path = with_suffix(prefix, suffix)
            if path.is_file() and sha256_of(path) != expected:
                yield f"{path}: its sha256 does not match the manifest"
        try:
            file = TokenFile(prefix)
        except DataError as error:
            yield str(error)
            return
        if (file.documents, len(file.tokens)) != (entry.documents, entry.tokens):
            yield (
                f"{prefix}: {file.documents} documents and {len(file.tokens)} tokens, but the manifest says"
                f" {entry.documents} and {entry.tokens}"
            )
        index_faults = file.index_faults()
        yield from index_faults
        id_faults = list(self._id_faults(file, entry))
        yield from id_faults
        if self.tokenizer and not index_faults and not id_faults:
            yield from document_faults(file, self.tokenizer, self.manifest.corpus.get("kind") == IMPORTED)

    def _id_faults(self, file: TokenFile, entry: TokenFileEntry) -> Iterator[str]:
        vocab_size, smallest, largest, text_bytes = self.manifest.vocab_size, 0, -1, 0
        for start in range(0, len(file.tokens), PIECE):
            ids = file.tokens[start : start + PIECE]
            smallest, largest = min(smallest, int(ids.min())), max(largest, int(ids.max()))
            if self.bytes_of_ids is not None and smallest >= 0 and largest < vocab_size:
                text_bytes += int(self.bytes_of_ids[ids].sum())
        name = f"{file.prefix}.bin"
        if largest != entry.largest_id:
            yield f"{name}: largest id {largest}, but the manifest says {entry.largest_id}"
        if smallest < 0:
            yield f"{name}: id {smallest} must not be negative"
        if largest >= vocab_size:
            yield f"{name}: id {largest} must be below vocab_size {vocab_size}"
        elif self.bytes_of_ids is not None and smallest >= 0 and text_bytes != entry.text_bytes:
            yield f"{name}: {text_bytes} bytes of text, but the manifest says {entry.text_bytes}"


def document_faults(file: TokenFile, tokenizer: Tokenizer, imported: bool = False) -> Iterator[str]:
    """Yields faults of documents: a missing end, and samples whose text encodes to other ids. The index must be
    valid.
    """
    size, without_end = file.dtype.itemsize, 0
    for start in range(0, len(file.lengths), PIECE):
        ends = file.pointers[start : start + PIECE] // size + file.lengths[start : start + PIECE]
        without_end += int((file.tokens[ends - 1] != tokenizer.end_of_document).sum())
    if without_end:
        yield f"{file.prefix}.bin: {without_end} documents do not end with id {tokenizer.end_of_document}"
    sample = np.unique(np.linspace(0, len(file.lengths) - 1, min(SAMPLE, len(file.lengths)), dtype=np.int64)).tolist()
    different = [document for document in sample if not _sampled_is_itself(file, document, tokenizer)]
    if len(different) > (len(sample) * (1 - IMPORTED_SAME) if imported else 0):
        yield (
            f"{file.prefix}: the text of document {different[0]} encodes to other ids"
            f" ({len(different)} of {len(sample)} sampled do): they were made with another tokenizer"
        )


def _sampled_is_itself(file: TokenFile, document: int, tokenizer: Tokenizer) -> bool:
    start, length = int(file.pointers[document]) // file.dtype.itemsize, int(file.lengths[document]) - 1
    ids = file.tokens[start : start + min(length, SAMPLE_TOKENS)]
    return encodes_to_itself(ids, tokenizer, cut=length > SAMPLE_TOKENS)


def encodes_to_itself(ids: np.ndarray, tokenizer: Tokenizer, cut: bool) -> bool:
    """True if the text of `ids` encodes to the same ids. cut: only the first half must, because the end is cut off."""
    sure = len(ids) // 2 if cut else len(ids)
    try:
        return np.array_equal(tokenizer.encode(tokenizer.decode(ids))[:sure], ids[:sure])
    except DataError:  # an id without a token
        return False
