"""From token files to windows.

The documents of a split form one stream, file after file. Window i holds the inputs [i·T, i·T + T) and, one later,
their targets; neighbours share a token, so every token but the stream's first is a target once an epoch, also those
of the last, shorter window.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.faults import check
from data_prep.token_file import MANIFEST_FILE, TOKENIZER_FOLDER, TokenFile
from data_prep.tokenizer_spec import TokenizerSpec

from ..config.data import DataConfig
from .blend import Blend

IGNORED = -100  # target of a position that has none
NAMED_BY = 2**18  # tokens and lengths at each end of a foreign pair that its name is made of


@dataclass(frozen=True)
class Corpus:
    """Opened token files. A foreign pair has no validation split, no tokenizer and an unknown vocabulary."""

    name: str  # a hash of its training tokens: its counter and its order hold wherever the files are moved
    train: tuple[TokenFile, ...]
    val: tuple[TokenFile, ...]
    vocab_size: int | None
    bytes_of_ids: np.ndarray | None  # length of each id's text; 0 for special tokens
    tokenizer: Path | None
    tokenizer_fingerprint: str | None

    @property
    def tokens(self) -> int:
        """For training."""
        return sum(file.size for file in self.train)


@dataclass(frozen=True)
class Data:
    """The corpora of a run, by their titles: all of one vocabulary."""

    corpora: dict[str, Corpus]
    blend: Blend

    @property
    def vocab_size(self) -> int | None:
        return self._any.vocab_size

    @property
    def bytes_of_ids(self) -> np.ndarray | None:
        return self._any.bytes_of_ids

    @property
    def tokenizer(self) -> Path | None:
        return self._any.tokenizer

    @property
    def tokenizer_fingerprint(self) -> str | None:
        return self._any.tokenizer_fingerprint

    @property
    def _any(self) -> Corpus:
        return next(iter(self.corpora.values()))


def open_data(config: DataConfig) -> Data:
    """Opens every corpus. ValueError naming the fault; also where two have other tokenizers, or are the same tokens."""
    paths = config.paths
    corpora = {title: open_corpus(Path(path)) for title, path in paths.items()}
    weights = {0: config.weights or {title: corpus.tokens for title, corpus in corpora.items()}} | config.stages
    data = Data(corpora, Blend({begin: [stage[title] for title in corpora] for begin, stage in weights.items()}))
    for title, corpus in data.corpora.items():
        if corpus.tokenizer_fingerprint != data.tokenizer_fingerprint:
            first = next(iter(paths))
            raise ValueError(
                f"data.corpora.{title}={paths[title]} must be tokenised as data.corpora.{first} is: it has another"
                " tokenizer"
            )
        for twin in data.corpora.keys() - {title}:
            if data.corpora[twin].name == corpus.name:
                raise ValueError(f"data.corpora.{title} and data.corpora.{twin} are the same tokens: give one weight")
    for corpus in corpora.values():
        if config.packing == "best_fit" or (config.masked and corpus.tokenizer is None):  # others have `verify`
            _check_indices(corpus)
    return data


def _check_indices(corpus: Corpus) -> None:
    """Reads them whole. ValueError on the first fault."""
    for file in (*corpus.train, *corpus.val):
        for fault in file.index_faults():
            raise ValueError(fault)


def open_corpus(path: Path) -> Corpus:
    """Opens and cheaply checks a corpus: manifest, sizes, tokenizer. Raises ValueError naming the fault."""
    if (path / MANIFEST_FILE).is_file() or path.is_dir():
        corpus = _open_folder(path)
    elif path.with_name(path.name + ".idx").is_file() or path.suffix in (".bin", ".idx"):
        file = TokenFile(path)
        corpus = Corpus(_name_of_pair(file), (file,), (), None, None, None, None)
    else:
        raise ValueError(f"data.path={path} is neither a folder of token files nor the prefix of a .bin and .idx pair")
    if corpus.tokens < 2:
        raise ValueError(f"data.path={path} has fewer than two training tokens")
    return corpus


def _open_folder(path: Path) -> Corpus:
    manifest = check(path)
    train, val = (tuple(TokenFile(path / entry.name) for entry in manifest.split(split)) for split in ("train", "val"))
    spec = TokenizerSpec.load(path / TOKENIZER_FOLDER)
    bytes_of_ids = spec.bytes_of_ids()
    name = hashlib.sha256("".join(entry.sha256[".bin"] for entry in manifest.split("train")).encode()).hexdigest()
    return Corpus(name[:16], train, val, manifest.vocab_size, bytes_of_ids, path / TOKENIZER_FOLDER, spec.fingerprint)


def _name_of_pair(file: TokenFile) -> str:
    """Name of a pair that brings no hashes: from the lengths and the ends of its two files."""
    digest = hashlib.sha256(f"{file.size} {file.sequences}".encode())
    for part in (file.tokens, file.lengths):
        digest.update(part[:NAMED_BY].tobytes() + part[-NAMED_BY:].tobytes())
    return digest.hexdigest()[:16]


class Window(NamedTuple):
    """tokens, targets: [T] int64, a target IGNORED where there is none. Of several windows, [B, T].

    starts: where in the window the document of each token begins, [T] int64; None where they are not told apart.
    """

    tokens_T: np.ndarray
    targets_T: np.ndarray
    starts_T: np.ndarray | None = None

    def row(self, b: int) -> "Window":
        """One of several, to be filled."""
        return Window(self.tokens_T[b], self.targets_T[b], None if self.starts_T is None else self.starts_T[b])


class DocumentSpan(NamedTuple):
    """A document's tokens in a window: [start, stop) of it, which begin at the document's token `offset`."""

    file: TokenFile
    document: int
    offset: int
    start: int
    stop: int


class Windows:
    """The windows of T tokens over a stream of token files; `masked`: their documents are told apart."""

    def __init__(self, files: tuple[TokenFile, ...], seq_len: int, *, masked: bool = False) -> None:
        self.files, self.seq_len, self.masked = files, seq_len, masked
        self._begins = [0, *accumulate(file.size for file in files)]  # of the files in the stream, and its end

    @property
    def tokens(self) -> int:
        return self._begins[-1]

    def __len__(self) -> int:
        return -(-max(0, self.tokens - 1) // self.seq_len)

    def __getitem__(self, index: int) -> Window:
        window = self.empty_batch()
        self.fill(index, window)
        return window

    def empty_batch(self, *batch: int) -> Window:
        """For one window, or a batch of them; not filled."""
        shape = (*batch, self.seq_len)
        return Window(
            np.empty(shape, np.int64), np.empty(shape, np.int64), np.empty(shape, np.int64) if self.masked else None
        )

    def fill(self, index: int, window: Window) -> None:
        """Window `index`. At the stream's end, and between documents that are told apart, targets are IGNORED."""
        self._check(index)
        parts = list(self._parts(index * self.seq_len, (index + 1) * self.seq_len + 1))
        pieces = [file.tokens[low:high] for _, file, low, high in parts]
        stream = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        n = len(stream) - 1
        window.tokens_T[:n], window.tokens_T[n:] = stream[:-1], 0
        window.targets_T[:n], window.targets_T[n:] = stream[1:], IGNORED
        if window.starts_T is not None:
            window.starts_T[:] = 0
            for at, file, low, high in parts:
                for begin in file.document_starts(low, high):
                    place = at + begin - low
                    if place:
                        window.targets_T[place - 1] = IGNORED
                    window.starts_T[place:] = place

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} is outside [0, {len(self)})")

    def documents(self, index: int) -> list[DocumentSpan]:
        """The documents that window `index` has tokens of, in their order."""
        parts = []
        for at, file, low, high in self._parts(index * self.seq_len, (index + 1) * self.seq_len):
            begins = [begin for begin in file.document_starts(low, high) if begin > low]
            for start, stop in pairwise([low, *begins, high]):
                document, offset = file.document_at(start)
                parts.append(DocumentSpan(file, document, offset, at + start - low, at + stop - low))
        return parts

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, TokenFile, int, int]]:
        """The files that have the stream's tokens [start, stop), with where in that range and in the file they are."""
        begin, stop = start, min(stop, self.tokens)
        i = bisect_right(self._begins, start) - 1
        while start < stop:
            at, end = self._begins[i], min(stop, self._begins[i + 1])
            yield start - begin, self.files[i], start - at, end - at
            start, i = end, i + 1
