"""Windows of tokens from token files.

The documents of a split form one stream, file after file. Window i has the inputs [i·T, i·T + T) and the targets one
position later. Neighbouring windows share a token, so every token except the first of the stream is a target once per
epoch. The last window may be shorter.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.errors import no_token_files
from data_prep.faults import check
from data_prep.token_file import MANIFEST_FILE, TOKENIZER_FOLDER, TokenFile
from data_prep.tokenizer_spec import TokenizerSpec

from ..config.data import DataConfig
from .blend import Blend
from .blocks import BlockCache, RemoteTokenFile

IGNORED = -100  # target of a position without a target
NAMED_BY = 2**18  # number of tokens and lengths, at each end of a foreign pair, that its name is hashed from


@dataclass(frozen=True)
class Corpus:
    """Opened token files of one corpus. A foreign pair has no validation split, tokenizer or vocabulary size."""

    name: str  # a hash of the training tokens, so that position and order survive a move of the files
    train: tuple[TokenFile, ...]
    val: tuple[TokenFile, ...]
    vocab_size: int | None
    bytes_of_ids: np.ndarray | None  # bytes of text per id; 0 for special tokens
    tokenizer: Path | None
    tokenizer_fingerprint: str | None
    cache: BlockCache | None = None  # of a store's blocks on this node

    @property
    def tokens(self) -> int:
        """Number of training tokens."""
        return sum(file.size for file in self.train)


@dataclass(frozen=True)
class Data:
    """Corpora of a run, by title. All have the same vocabulary."""

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
    """Opens all corpora.

    Raises ValueError if a corpus is faulty, if two have different tokenizers, or if two have the same tokens.
    """
    paths = config.paths
    corpora = {title: open_corpus(path, config.key_of(title), config.cache) for title, path in paths.items()}
    weights = {0: config.weights or {title: corpus.tokens for title, corpus in corpora.items()}} | config.stages
    data = Data(corpora, Blend({begin: [stage[title] for title in corpora] for begin, stage in weights.items()}))
    for title, corpus in data.corpora.items():
        if corpus.tokenizer_fingerprint != data.tokenizer_fingerprint:
            first = next(iter(paths))
            raise ValueError(
                f"data.corpora.{title}={paths[title]} must have the tokenizer of data.corpora.{first}: tokenise it"
                " again"
            )
        for twin in data.corpora.keys() - {title}:
            if data.corpora[twin].name == corpus.name:
                raise ValueError(f"data.corpora.{title} and data.corpora.{twin} have the same tokens: leave one out")
    for corpus in corpora.values():
        if config.packing == "best_fit" or (config.masked and corpus.tokenizer is None):  # `verify` checks the others
            _check_indices(corpus)
    return data


def _check_indices(corpus: Corpus) -> None:
    """Reads the indices completely. Raises ValueError at the first fault."""
    for file in (*corpus.train, *corpus.val):
        for fault in file.index_faults():
            raise ValueError(fault)


def open_corpus(path: Path | str, key: str = "data.path", cache: str = "") -> Corpus:
    """Opens a corpus. Checks manifest, sizes and tokenizer, not the tokens. Raises ValueError if one is faulty, OSError
    if a store cannot be reached. key: the setting that names it; cache: `data.cache`.
    """
    if "://" in str(path):
        from .remote import fetched  # imports fsspec

        remote = fetched(str(path), key, cache)
        corpus = _open_folder(remote.folder, remote)
    elif ((path := Path(path)) / MANIFEST_FILE).is_file():
        corpus = _open_folder(path)
    elif any(path.with_name(path.name + end).is_file() for end in (".bin", ".idx")) or path.suffix in (".bin", ".idx"):
        file = TokenFile(path)
        corpus = Corpus(_name_of_pair(file), (file,), (), None, None, None, None)
    else:
        raise ValueError(f"{key}={path} {no_token_files(path)}")
    if corpus.tokens < 2:
        raise ValueError(f"{key}={path} has fewer than two training tokens")
    return corpus


def _open_folder(path: Path, cache: BlockCache | None = None) -> Corpus:
    """cache: of the blocks of the token files, if they come from a store."""
    manifest = check(path)
    train, val = (
        tuple(
            TokenFile(path / entry.name) if cache is None else RemoteTokenFile(path / entry.name, cache)
            for entry in manifest.split(split)
        )
        for split in ("train", "val")
    )
    spec = TokenizerSpec.load(path / TOKENIZER_FOLDER)
    bytes_of_ids = spec.bytes_of_ids()
    name = hashlib.sha256("".join(entry.sha256[".bin"] for entry in manifest.split("train")).encode()).hexdigest()
    tokenizer = path / TOKENIZER_FOLDER
    return Corpus(name[:16], train, val, manifest.vocab_size, bytes_of_ids, tokenizer, spec.fingerprint, cache)


def _name_of_pair(file: TokenFile) -> str:
    """Name of a pair without a manifest: a hash of the sizes and the ends of both files."""
    digest = hashlib.sha256(f"{file.size} {file.sequences}".encode())
    for part in (file.tokens, file.lengths):
        digest.update(part[:NAMED_BY].tobytes() + part[-NAMED_BY:].tobytes())
    return digest.hexdigest()[:16]


class Window(NamedTuple):
    """One window, int64 [T], or a batch of windows, [B, T]."""

    tokens_T: np.ndarray
    targets_T: np.ndarray  # IGNORED: no target
    starts_T: np.ndarray | None = None  # where each token's document begins; None: documents are not separated


class Parts:
    """Slices of tokens to be joined to a batch of B windows, each of T positions. A place is b·T + t.

    numpy is called per batch, not per document: for one document, a call takes longer than the copy.
    """

    def __init__(self, B: int, T: int) -> None:
        self.B, self.T = B, T
        self.inputs: list[np.ndarray] = []  # B·T tokens
        self.targets: list[np.ndarray] = []
        self.starts: list[int] = []  # places at which a document begins in its window, rising
        self.cuts: list[int] = []  # places after a target that belongs to another document

    def pad(self, positions: int) -> None:
        """Appends positions without a target."""
        if positions:
            self.inputs.append(np.zeros(positions, np.int64))
            self.targets.append(np.full(positions, IGNORED))

    def joined(self, masked: bool) -> Window:
        """Returns the batch, int64 [B, T]. masked: with the starts of the documents."""
        # malloc keeps one allocation, but returns several to the system
        all_BT = np.empty((2 + masked, self.B, self.T), np.int64)
        tokens_N, targets_N, *starts_N = all_BT.reshape(2 + masked, -1)
        np.concatenate(self.inputs, out=tokens_N)
        np.concatenate(self.targets, out=targets_N)
        if self.cuts:
            targets_N[np.array(self.cuts) - 1] = IGNORED
        if masked:
            starts = np.array([*self.starts, self.B * self.T])
            starts_N[0][:] = np.repeat(starts[:-1] % self.T, starts[1:] - starts[:-1])
        return Window(*all_BT)


class DocumentSpan(NamedTuple):
    """Part of a document in a window: positions [start, stop), beginning at the document's token `offset`."""

    file: TokenFile
    document: int
    offset: int
    start: int
    stop: int


class Windows:
    """Windows of T tokens over a stream of token files. masked: separate documents in attention and targets."""

    def __init__(self, files: tuple[TokenFile, ...], seq_len: int, *, masked: bool = False) -> None:
        self.files, self.seq_len, self.masked = files, seq_len, masked
        self._begins = [0, *accumulate(file.size for file in files)]  # start of each file in the stream, and the end
        self.tokens = self._begins[-1]
        self._count = -(-max(0, self.tokens - 1) // seq_len)
        self.remote = any(isinstance(file, RemoteTokenFile) for file in files)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Window:
        return Window(*(None if part is None else part[0] for part in self.batch([index])))  # type: ignore[arg-type]

    def batch(self, indices: Sequence[int]) -> Window:
        """Reads these windows to int64 [B, T]. Targets past the stream's end or in another document are IGNORED."""
        parts, T = Parts(len(indices), self.seq_len), self.seq_len
        for row, index in enumerate(indices):
            self._check(index)
            begin, place = index * T, row * T  # in the stream, and in the batch
            file, low = self._file(begin)
            if low + T < file.size:
                stream = file.read(low, low + T + 1)
                parts.inputs.append(stream[:-1])
                parts.targets.append(stream[1:])
                ranges = [(file, low + 1, low + T + 1)]
            else:  # in several files, or at the end of the stream
                end = min(begin + T, self.tokens - 1)
                parts.inputs += [file.read(low, high) for file, low, high in self._ranges(begin, end)]
                ranges = self._ranges(begin + 1, end + 1)
                parts.targets += [file.read(low, high) for file, low, high in ranges]
                parts.pad(begin + T - end)
            if self.masked:
                parts.starts.append(place)
                for file, low, high in ranges:
                    cuts = [place + 1 + start - low for start in file.document_starts(low, high)]
                    parts.starts += cuts
                    parts.cuts += cuts
                    place += high - low
        return parts.joined(self.masked)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Says that these windows will be read soon. Does nothing for files on the disk."""
        if self.remote:
            for index in indices:
                for file, low, high in self._reads(index):
                    file.prefetch(low, high)

    def _reads(self, index: int) -> Iterable[tuple[TokenFile, int, int]]:
        """Lists the ranges of tokens that the window needs, with its last target."""
        return self._ranges(index * self.seq_len, (index + 1) * self.seq_len + 1)

    def _check(self, index: int) -> None:
        if not 0 <= index < self._count:
            raise IndexError(f"window {index} is outside [0, {self._count})")

    def documents(self, index: int) -> list[DocumentSpan]:
        """Documents with tokens in window `index`, in order."""
        spans, at = [], 0
        for file, low, high in self._ranges(index * self.seq_len, (index + 1) * self.seq_len):
            begins = [begin for begin in file.document_starts(low, high) if begin > low]
            for start, stop in pairwise([low, *begins, high]):
                document, offset = file.document_at(start)
                spans.append(DocumentSpan(file, document, offset, at + start - low, at + stop - low))
            at += high - low
        return spans

    def _file(self, place: int) -> tuple[TokenFile, int]:
        """Returns the file with the token at a place of the stream, and the token's place there."""
        i = bisect_right(self._begins, place) - 1
        return self.files[i], place - self._begins[i]

    def _ranges(self, start: int, stop: int) -> list[tuple[TokenFile, int, int]]:
        """Lists the files with the tokens [start, stop) of the stream, cut at its end, and the range in each file."""
        i, stop, ranges = bisect_right(self._begins, start) - 1, min(stop, self.tokens), []
        while start < stop:
            at, end = self._begins[i], min(stop, self._begins[i + 1])
            ranges.append((self.files[i], start - at, end - at))
            start, i = end, i + 1
        return ranges
