"""Encodes documents to ids: with gigatoken if it gives the same ids as tiktoken, else with tiktoken.

gigatoken knows a few split patterns by name and caches words, so it is many times faster. It is not trusted: before
a run both encode the same text, and one difference excludes gigatoken.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.bpe import PATTERNS
from data_prep.errors import headline
from data_prep.long import LongDocument, cut
from data_prep.source import Document, Rejected
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer, may_have_long_run
from data_prep.tokenizer_spec import RANKS_FILE

SAMPLE_BYTES = 1 << 21  # bytes of text that both must encode to the same ids
UNSUPPORTED = "gigatoken does not support these ranks: tiktoken is used"
CACHE_BYTES = 1 << 28  # gigatoken caches every word, 100 bytes each: it is rebuilt after the process grows by this

# gigatoken's names of split patterns, ours and tiktoken's.
SCHEMES = {
    PATTERNS["gpt2"]: "gpt2",
    PATTERNS["cl100k"]: "gpt4",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": "gpt2",
    (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$"
        r"|\s*[\r\n]|\s+(?!\S)|\s"
    ): "gpt4",
    "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ): "o200k",
}


class Encoder:
    """The encoder of a worker. scheme: gigatoken's; None: tiktoken alone."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, scheme: str | None) -> None:
        self._tokenizer, self._folder, self._scheme = tokenizer, folder, scheme
        self._fast: Any = None
        self._limit = 0  # bytes of memory at which gigatoken is rebuilt
        self.bytes_of_ids = tokenizer.spec.bytes_of_ids().astype(np.int32)  # 0 for special tokens
        self.vocab_size = tokenizer.vocab_size
        self.end = np.array([tokenizer.end_of_document], dtype=np.uint32)

    @classmethod
    def load(cls, folder: Path, scheme: str | None) -> "Encoder":
        """Loads the tokenizer of an output folder."""
        return cls(Tokenizer.load(folder / TOKENIZER_FOLDER), folder, scheme)

    def encode_all(self, documents: Sequence[Document]) -> list[np.ndarray | Rejected]:
        """The ids of each document; a Rejected if the tokenizer fails on it, or if its ids lack some of its text."""
        with muted():
            found = self._ids_of(documents)
        if self._size_of(found) == sum(len(document.data) for document in documents):
            return found
        return [
            ids if isinstance(ids, Rejected) or self._size_of([ids]) == len(document.data) else lost(document)
            for document, ids in zip(documents, found, strict=True)
        ]

    def _size_of(self, found: Sequence[np.ndarray | Rejected]) -> int:
        """The bytes of text of all ids together."""
        ids = [ids for ids in found if not isinstance(ids, Rejected)]
        if not ids:
            return 0
        places = np.concatenate(ids, dtype=np.intp)  # with mode="clip": twice as fast as `take` alone
        return int(self.bytes_of_ids.take(places, mode="clip").sum(dtype=np.int64))

    def _ids_of(self, documents: Sequence[Document]) -> list[np.ndarray | Rejected]:
        if self._scheme is None or any(may_have_long_run(document.text) for document in documents):
            return [self._encode(document) for document in documents]
        if resident_bytes() > self._limit:
            self._fast = None  # freed first, so that there are never two
            self._fast = gigatoken_of(self._folder, self._scheme)
            self._limit = resident_bytes() + CACHE_BYTES
        try:
            return list(encode_batch(self._fast, [document.data for document in documents]))
        except BaseException as error:
            if not is_panic(error):
                raise
            return [self._encode(document) for document in documents]

    def _encode(self, document: Document) -> np.ndarray | Rejected:
        try:
            return self._tokenizer.encode(document.text)
        except BaseException as error:
            if not is_panic(error):
                raise
            return Rejected(document.id, f"the tokenizer failed: {type(error).__name__}: {headline(error)}")


def lost(document: Document) -> Rejected:
    return Rejected(document.id, "the tokenizer's pattern drops some of its text")


def is_panic(error: BaseException) -> bool:
    """True if the document caused the error: a Rust panic (not an Exception), but not a lack of memory."""
    return type(error).__name__ == "PanicException" or (
        isinstance(error, Exception) and not isinstance(error, MemoryError)
    )


@contextmanager
def muted() -> Iterator[None]:
    """Discards standard error, because Rust writes a panic there before it can be caught."""
    try:
        before = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


def resident_bytes() -> int:
    """The resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def gigatoken_of(folder: Path, scheme: str) -> Any:
    import gigatoken

    return gigatoken.Tokenizer.from_tiktoken(folder / TOKENIZER_FOLDER / RANKS_FILE, scheme).backend


def encode_batch(fast: Any, texts: list[bytes]) -> list[np.ndarray]:
    """Encodes all texts in one call; the arrays are views of one array."""
    layout = fast.encode_batch(texts, parallel=False).layout
    ids, offsets = np.asarray(layout.content.data), np.asarray(layout.offsets.data)
    return np.split(ids[: offsets[-1]], offsets[1:-1]) if len(texts) else []


def scheme_for(tokenizer: Tokenizer, folder: Path, sample: Iterable[Document | LongDocument]) -> tuple[str | None, str]:
    """gigatoken's scheme, if gigatoken is installed and encodes the sample as tiktoken does, else a line that says
    why not. If it is not installed: no scheme and an empty line.
    """
    if find_spec("gigatoken") is None:
        return None, ""
    scheme = SCHEMES.get(tokenizer.spec.pattern)
    if scheme is None:
        return None, "gigatoken is not used: it does not support this tokenizer's pattern"
    try:
        documents = sample_of(sample)
        if not documents:
            return None, "gigatoken is not used: without text it cannot be compared with tiktoken"
        with muted():
            same = encode_batch(gigatoken_of(folder, scheme), [document.data for document in documents])
            for document, ids in zip(documents, same, strict=True):
                if not np.array_equal(ids, tokenizer.encode(document.text)):
                    return None, f"gigatoken is not used: it encodes {document.id} differently from tiktoken"
    except BaseException as error:
        if type(error).__name__ == "PanicException" or isinstance(error, RuntimeError):  # raised for unusual ranks
            return None, UNSUPPORTED
        if not is_panic(error):
            raise
        return None, f"gigatoken is not used: {type(error).__name__}: {headline(error)}"
    return scheme, ""


def sample_of(documents: Iterable[Document | LongDocument]) -> list[Document]:
    """Takes documents from the first two megabytes, and the beginnings of long ones, if they can be encoded whole."""
    sample, size = [], 0
    for document in documents:
        if isinstance(document, LongDocument):
            with suppress(ValueError):  # not UTF-8: it will be quarantined
                text = next(cut(document.pieces()), "")
                document = Document(document.id, text, text.encode())
        if isinstance(document, Document):
            size += len(document.data)
            if not may_have_long_run(document.text):
                sample.append(document)
        if size >= SAMPLE_BYTES:
            break
    return sample
