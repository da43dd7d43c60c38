"""The format: token files as Megatron's `.bin` and `.idx`, and their manifest. numpy only.

    OUT/train-00000.bin .idx    documents one after the other, each ended by the end-of-document id
    OUT/val-00000.bin .idx      the same, of the validation documents
    OUT/tokenizer/              ranks.tiktoken, spec.json
    OUT/manifest.json           written last: a folder that has it is whole

All numbers are little-endian. `.bin`: the ids, uint16 for a vocabulary below 65,500 rows, else int32. `.idx`:
magic, version uint64, dtype code uint8, sequences uint64, documents + 1 uint64; then for each sequence its
length (int32) and its byte offset (int64), and the first sequence of each document and the end (int64).
"""

import json
import struct
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_prep.durable import DurableFile, durable, sha256_of
from data_prep.errors import DataError, headline
from data_prep.tokenizer_spec import TokenizerSpec

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_NAMES = ("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2")  # Megatron's codes 1 to 8
DTYPES = {code: np.dtype(name) for code, name in enumerate(DTYPE_NAMES, start=1)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
UINT16_ROWS = 65_500  # Megatron's bound
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "val")


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size < UINT16_ROWS else np.dtype("<i4")


def index_bytes(sequences: int, documents: int) -> int:
    """Size of an `.idx` file."""
    return HEADER.size + 12 * sequences + 8 * (documents + 1)


class TokenFileWriter:
    """Writes PREFIX.bin and PREFIX.idx, one document at a time; a context manager.

    Both files appear when the block ends well, `.bin` first; on an error neither does. Raises DataError on an
    id outside [0, vocab_size), OSError on a full disk.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.tokens = 0
        self.largest_id = -1
        self.sha256: dict[str, str] = {}
        self._lengths = array("i")

    def __enter__(self) -> "TokenFileWriter":
        self._bin = DurableFile(with_suffix(self.prefix, ".bin"))
        return self

    def add(self, ids: np.ndarray) -> None:
        """Append one document: a 1-D array of ids, its end-of-document id included."""
        if len(ids) == 0 or len(ids) > np.iinfo(np.int32).max:
            raise DataError(f"{self.prefix}: a document of {len(ids)} tokens must have 1 to 2^31 - 1")
        smallest, largest = int(ids.min()), int(ids.max())  # before narrowing: astype wraps silently
        if smallest < 0 or largest >= self.vocab_size:
            wrong = smallest if smallest < 0 else largest
            raise DataError(f"{self.prefix}: id {wrong} must be in [0, {self.vocab_size})")
        self._bin.write(ids.astype(self.dtype).data.cast("B"))
        self._lengths.append(len(ids))
        self.tokens += len(ids)
        self.largest_id = max(self.largest_id, largest)

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        files = [self._bin]
        try:
            if error is None:
                files.append(DurableFile(with_suffix(self.prefix, ".idx")))
                files[1].write(self._index())
                for file in files:
                    file.finish()
                for file in files:
                    file.publish()
                self.sha256 = {file.path.suffix: file.sha256 for file in files}
        finally:
            for file in files:
                file.discard()  # after publish: nothing is left to discard

    def _index(self) -> bytes:
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        pointers = (ends - lengths) * self.dtype.itemsize
        documents = np.arange(len(lengths) + 1, dtype=np.int64)
        header = HEADER.pack(MAGIC, VERSION, CODES[self.dtype], len(lengths), len(documents))
        body = (lengths.astype("<i4"), pointers.astype("<i8"), documents.astype("<i8"))
        return header + b"".join(part.tobytes() for part in body)


class TokenFile:
    """A pair PREFIX.bin and PREFIX.idx, ours or Megatron's, memory-mapped.

    `tokens`: 1-D memmap of all tokens; `lengths`: int32 [sequences]; `pointers`: int64 [sequences], byte
    offsets; `document_indices`: int64 [documents + 1]. Raises DataError, naming file and rule, where a file
    is missing, is of another kind, or has a size that does not fit its header.
    """

    def __init__(self, prefix: Path | str) -> None:
        prefix = Path(prefix)
        self.prefix = prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix
        bin_path, idx_path = with_suffix(self.prefix, ".bin"), with_suffix(self.prefix, ".idx")
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{path} is missing")
        self.dtype, sequences, self.documents = read_header(idx_path)
        index = np.memmap(idx_path, dtype=np.uint8, mode="r", offset=0)[HEADER.size :]
        lengths, pointers, documents = np.split(index, [4 * sequences, 12 * sequences])
        self.lengths: np.ndarray = lengths.view("<i4")
        self.pointers: np.ndarray = pointers.view("<i8")
        self.document_indices: np.ndarray = documents.view("<i8")
        expected, size = int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize, bin_path.stat().st_size
        if size != expected:
            raise DataError(f"{bin_path}: {size} bytes, but its index says {expected}")
        self.tokens: np.ndarray = np.memmap(bin_path, dtype=self.dtype, mode="r") if size else np.empty(0, self.dtype)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Places in [start, stop) of the tokens that begin a document, rising. Reads a few numbers of the index."""
        first, last = (bisect_left(self.pointers, place * self.dtype.itemsize) for place in (start, stop))
        sequences = np.arange(first, last)
        low = bisect_left(self.document_indices, first)
        documents = self.document_indices[low : low + len(sequences)]  # a document may be of several sequences, or none
        begin = sequences[np.isin(sequences, documents)]
        return np.unique(self.pointers[begin] // self.dtype.itemsize)

    def document_at(self, place: int) -> tuple[int, int]:
        """The document that the token at `place` is of, and which of its tokens it is."""
        sequence = bisect_right(self.pointers, place * self.dtype.itemsize) - 1
        document = bisect_right(self.document_indices, sequence) - 1
        start = int(self.pointers[self.document_indices[document]]) // self.dtype.itemsize
        return document, place - start

    def index_faults(self) -> list[str]:
        """What is wrong inside the index. Reads it all, and no token."""
        name, faults = with_suffix(self.prefix, ".idx"), []
        if (self.lengths < 0).any():
            faults.append(f"{name}: a sequence has a negative length")
        ends = np.cumsum(self.lengths, dtype=np.int64)
        if not np.array_equal(self.pointers, (ends - self.lengths) * self.dtype.itemsize):
            faults.append(f"{name}: the offsets are not those of the lengths")
        documents = self.document_indices
        if documents[0] != 0 or documents[-1] != len(self.lengths) or (np.diff(documents) < 0).any():
            faults.append(f"{name}: the documents must rise from 0 to {len(self.lengths)} sequences")
        return faults


def with_suffix(prefix: Path, suffix: str) -> Path:
    """PREFIX + suffix; unlike Path.with_suffix it keeps a dot in the prefix's name."""
    return prefix.with_name(prefix.name + suffix)


def read_header(path: Path) -> tuple[np.dtype, int, int]:
    """dtype, sequences and documents of an `.idx` file, checked against its size."""
    with open(path, "rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size:
        raise DataError(f"{path}: {len(header)} bytes, but the header alone has {HEADER.size}")
    magic, version, code, sequences, document_count = HEADER.unpack(header)
    if magic != MAGIC or version != VERSION:
        raise DataError(f"{path}: not an index of version {VERSION} (magic {magic!r}, version {version})")
    if code not in DTYPES:
        raise DataError(f"{path}: dtype code {code} must be one of {min(DTYPES)} to {max(DTYPES)}")
    expected, size = index_bytes(sequences, document_count - 1), path.stat().st_size
    if document_count < 1 or size != expected:
        raise DataError(f"{path}: {size} bytes, but its header says {expected}")
    return DTYPES[code], sequences, document_count - 1


@dataclass(frozen=True)
class TokenFileEntry:
    """One token file in the manifest. `name`: its prefix, relative to the folder; `sha256`: by suffix."""

    name: str
    split: str
    documents: int
    tokens: int
    text_bytes: int
    largest_id: int
    sha256: dict[str, str]

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """Bytes of each of its files, by suffix."""
        return {".bin": self.tokens * dtype.itemsize, ".idx": index_bytes(self.documents, self.documents)}


@dataclass(frozen=True)
class Manifest:
    """What a finished folder holds. `corpus` and `config` say how it was made."""

    format_version: int
    tokenizer_fingerprint: str
    vocab_size: int
    corpus: dict[str, Any]
    config: dict[str, Any]
    files: tuple[TokenFileEntry, ...]

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """DataError, one message, where it is missing, unreadable or of another version."""
        path = Path(folder) / MANIFEST_FILE
        try:
            content = json.loads(path.read_bytes())
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(f"{path}: format version {version}, but this program reads {FORMAT_VERSION}")
            values = {field.name: content[field.name] for field in fields(cls)}
            values["files"] = tuple(TokenFileEntry(**entry) for entry in values["files"])
        except FileNotFoundError:
            raise DataError(f"{path} is missing: the folder was never finished, or is not one of token files") from None
        except DataError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not a manifest: {type(error).__name__} {headline(error)}") from error
        return cls(**values)

    def save(self, folder: Path) -> None:
        with durable(Path(folder) / MANIFEST_FILE) as file:
            file.write(json.dumps(asdict(self), indent=2).encode() + b"\n")

    def split(self, name: str) -> tuple[TokenFileEntry, ...]:
        """The files of "train" or of "val", in corpus order."""
        if name not in SPLITS:
            raise DataError(f"split {name!r} must be one of {', '.join(SPLITS)}")
        return tuple(entry for entry in self.files if entry.split == name)

    def totals(self, names: Iterable[str] = SPLITS) -> tuple[int, int, int]:
        """Documents, tokens and bytes of text of these splits."""
        chosen = [entry for name in names for entry in self.split(name)]
        return (
            sum(entry.documents for entry in chosen),
            sum(entry.tokens for entry in chosen),
            sum(entry.text_bytes for entry in chosen),
        )


def check(folder: Path) -> Manifest:
    """The cheap half of `verify`, for the start of a training: reads no token.

    The manifest, its tokenizer against the folder's, and that each file is there with the right size. Raises
    DataError on the first fault.
    """
    manifest = Manifest.load(Path(folder))
    for fault in [*_tokenizer_faults(folder, manifest), *_size_faults(folder, manifest)]:
        raise DataError(fault)
    return manifest


def verify(folder: Path) -> list[str]:
    """Every fault of the folder, one line each; reads everything. An empty list: it is as it was written."""
    folder = Path(folder)
    try:
        manifest = Manifest.load(folder)
    except DataError as error:
        return [str(error)]
    faults = [*_tokenizer_faults(folder, manifest), *_size_faults(folder, manifest)]
    for entry in manifest.files:
        faults += _content_faults(folder, manifest, entry)
    expected = {entry.name for entry in manifest.files}
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.idx")]):
        if path.stem not in expected:
            faults.append(f"{path} is not in the manifest")
    return faults


def _tokenizer_faults(folder: Path, manifest: Manifest) -> list[str]:
    where = Path(folder) / TOKENIZER_FOLDER
    try:
        spec = TokenizerSpec.load(where)
    except DataError as error:
        return [str(error)]
    faults = []
    if spec.fingerprint != manifest.tokenizer_fingerprint:
        faults.append(
            f"{where}: fingerprint {spec.fingerprint[:12]}, but the tokens were made by"
            f" {manifest.tokenizer_fingerprint[:12]}: it is another tokenizer"
        )
    if spec.vocab_size != manifest.vocab_size:
        faults.append(f"{where}: {spec.vocab_size} rows, but the manifest says {manifest.vocab_size}")
    return faults


def _size_faults(folder: Path, manifest: Manifest) -> list[str]:
    faults = []
    for entry in manifest.files:
        for suffix, expected in entry.sizes(token_dtype(manifest.vocab_size)).items():
            path = with_suffix(Path(folder) / entry.name, suffix)
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                faults.append(f"{path} is missing")
            elif size != expected:
                faults.append(f"{path}: {size} bytes, but the manifest says {expected}")
    return faults


def _content_faults(folder: Path, manifest: Manifest, entry: TokenFileEntry) -> list[str]:
    prefix, faults = folder / entry.name, []
    for suffix, expected in entry.sha256.items():
        path = with_suffix(prefix, suffix)
        if path.is_file() and sha256_of(path) != expected:
            faults.append(f"{path}: its sha256 is not that of the manifest")
    try:
        file = TokenFile(prefix)
    except DataError as error:
        return [*faults, str(error)]
    faults += file.index_faults()
    largest = int(file.tokens.max()) if len(file.tokens) else -1
    if largest != entry.largest_id:
        faults.append(f"{prefix}.bin: largest id {largest}, but the manifest says {entry.largest_id}")
    if largest >= manifest.vocab_size:
        faults.append(f"{prefix}.bin: id {largest} must be below vocab_size {manifest.vocab_size}")
    if (file.documents, len(file.tokens)) != (entry.documents, entry.tokens):
        faults.append(
            f"{prefix}: {file.documents} documents and {len(file.tokens)} tokens, but the manifest says"
            f" {entry.documents} and {entry.tokens}"
        )
    return faults
