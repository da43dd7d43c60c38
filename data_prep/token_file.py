"""Reads and writes token files (Megatron's `.bin` and `.idx`) and their manifest. Needs only numpy.

    OUT/train-00000.bin .idx    training documents, one after the other, each followed by the end-of-document id
    OUT/val-00000.bin .idx      validation documents, likewise
    OUT/tokenizer/              ranks.tiktoken, spec.json
    OUT/manifest.json           written last: a folder with a manifest is complete

All numbers are little-endian. `.bin`: the ids, uint16 for a vocabulary below 65,500 rows, else int32. `.idx`:
magic, version uint64, dtype code uint8, sequences uint64, documents + 1 uint64; then the length of each sequence
(int32), the byte offset of each sequence (int64), and the first sequence of each document plus the end (int64).
"""

import json
import struct
import weakref
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar, get_origin

import numpy as np

from data_prep.durable import DurableFile, durable, publish
from data_prep.errors import DataError, headline, no_token_files
from data_prep.lfs import refuse_pointer, refuse_pointer_text

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPE_NAMES = ("u1", "i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2")  # Megatron's codes 1 to 8
DTYPES = {code: np.dtype(name) for code, name in enumerate(DTYPE_NAMES, start=1)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
UINT16_ROWS = 65_500  # Megatron's limit
LONGEST_DOCUMENT = 2**31 - 1  # tokens; the index stores their number as int32
MOST_MAPPED = 200  # token files mapped at once, two files each
PIECE = 1 << 20  # numbers that are read at once
NEAR = 32  # sequences in which the end of a range is looked for first
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "val")
SUFFIXES = {".bin", ".idx"}


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2") if vocab_size < UINT16_ROWS else np.dtype("<i4")


def index_bytes(sequences: int, documents: int) -> int:
    """The size of an `.idx` file in bytes."""
    return HEADER.size + 12 * sequences + 8 * (documents + 1)


class TokenFileWriter:
    """Writes PREFIX.bin and PREFIX.idx, one document or piece at a time; a context manager.

    Both files appear if the block succeeds, `.bin` first; neither appears on an error. With `close`, the block can
    publish them together with other files. Raises DataError on an id outside [0, vocab_size), OSError on a full disk.
    Memory: 4 bytes per document, and 60 MB to write the index.
    """

    def __init__(self, prefix: Path, vocab_size: int) -> None:
        self.prefix = prefix
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.tokens = 0
        self.largest_id = -1
        self.sha256: dict[str, str] = {}
        self._lengths = array("i")
        self._open = 0  # tokens of the unfinished document

    def __enter__(self) -> "TokenFileWriter":
        self._bin = DurableFile(with_suffix(self.prefix, ".bin"))
        self._files = [self._bin]
        return self

    def add(self, ids: np.ndarray) -> None:
        """Appends one document: a 1-D array of ids, with the end-of-document id."""
        self.write(ids, [len(ids)])

    def write(self, ids: np.ndarray, ends: Sequence[int]) -> None:
        """Appends a piece of the stream. ends: the places in [1, len(ids)] after the documents' last ids, rising."""
        if len(ids):
            smallest, largest = int(ids.min()), int(ids.max())  # before narrowing: astype wraps silently
            if smallest < 0 or largest >= self.vocab_size:
                wrong = smallest if smallest < 0 else largest
                raise DataError(f"{self.prefix}: id {wrong} must be in [0, {self.vocab_size})")
            self._bin.write(ids.astype(self.dtype).data.cast("B"))
            self.largest_id = max(self.largest_id, largest)
        begin = -self._open
        for end in ends:
            self._check_length(end - begin)
            self._lengths.append(end - begin)
            begin = end
        self._open = len(ids) - begin
        self.tokens += len(ids)

    def _check_length(self, length: int) -> None:
        if not 1 <= length <= LONGEST_DOCUMENT:
            raise DataError(f"{self.prefix}: a document of {length} tokens must have 1 to 2^31 - 1")

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self.sha256:
                publish(self.close())
        finally:
            for file in self._files:
                file.discard()  # does nothing after publish

    def close(self) -> list[DurableFile]:
        """Writes the index. Returns both files, which the caller publishes inside the block."""
        if self._open:
            raise DataError(f"{self.prefix}: the last document has no end")
        index = DurableFile(with_suffix(self.prefix, ".idx"))
        self._files.append(index)
        for piece in self._index():
            index.write(piece)
        self.sha256 = {file.path.suffix: file.sha256 for file in self._files}
        return self._files

    def _index(self) -> Iterator[bytes]:
        documents, end = len(self._lengths), 0
        yield HEADER.pack(MAGIC, VERSION, CODES[self.dtype], documents, documents + 1)
        for lengths in self._pieces():
            yield lengths.astype("<i4").tobytes()
        for lengths in self._pieces():
            ends = end + np.cumsum(lengths, dtype=np.int64)
            yield ((ends - lengths) * self.dtype.itemsize).astype("<i8").tobytes()
            end = int(ends[-1])
        for start in range(0, documents + 1, PIECE):
            yield np.arange(start, min(start + PIECE, documents + 1), dtype="<i8").tobytes()

    def _pieces(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._lengths), PIECE):
            yield np.frombuffer(self._lengths[start : start + PIECE], dtype=np.int32)


class _Maps:
    """The two files, memory-mapped. bisect uses memoryviews of the index, because they give Python's own numbers."""

    def __init__(self, prefix: Path, dtype: np.dtype, sequences: int, size: int) -> None:
        index = np.memmap(with_suffix(prefix, ".idx"), dtype=np.uint8, mode="r")[HEADER.size :]
        lengths, pointers, documents = np.split(index, [4 * sequences, 12 * sequences])
        self.lengths, self.pointers, self.documents = lengths.view("<i4"), pointers.view("<i8"), documents.view("<i8")
        self.pointers_view, self.documents_view = pointers.data.cast("q"), documents.data.cast("q")
        path = with_suffix(prefix, ".bin")
        tokens = np.memmap(path, dtype=dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)
        self.tokens = tokens.view(np.ndarray)  # slicing a memmap takes ten times longer


class TokenFile:
    """A pair PREFIX.bin and PREFIX.idx, ours or Megatron's, memory-mapped while it is in use.

    `tokens`: all of them, 1-D; `lengths`: int32 [sequences]; `pointers`: int64 [sequences], byte offsets;
    `document_indices`: int64 [documents + 1]; `size`: number of tokens. Raises DataError with file and rule if a file
    is missing, has another format, or has a size that does not match its header.

    A map keeps its file open, and a process may open about a thousand files. So only the last MOST_MAPPED token files
    stay mapped; others are mapped again on use.
    """

    _mapped: ClassVar[deque["weakref.ref[TokenFile]"]] = deque()

    def __init__(self, prefix: Path | str) -> None:
        prefix = Path(prefix)
        self.prefix = prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix
        bin_path, idx_path = with_suffix(self.prefix, ".bin"), with_suffix(self.prefix, ".idx")
        for path in (bin_path, idx_path):
            if not path.is_file():
                raise DataError(f"{path} is missing")
            refuse_pointer(path)
        self.dtype, self.sequences, self.documents = read_header(idx_path)
        if self.dtype.kind == "f":
            raise DataError(f"{idx_path}: ids must be integers, not {self.dtype}")
        size = bin_path.stat().st_size
        self._itemsize = self.dtype.itemsize
        self.size = size // self._itemsize
        last = int(self.pointers[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if self.sequences else 0
        if size != last:  # O(1); `index_faults` checks the sum of the lengths
            raise DataError(f"{bin_path}: {size} bytes, but its index says {last}")

    @cached_property
    def _maps(self) -> _Maps:
        self._mapped.append(weakref.ref(self))
        if len(self._mapped) > MOST_MAPPED:
            first = self._mapped.popleft()()
            if first is not None:
                vars(first).pop("_maps", None)  # its readers still hold it
        return _Maps(self.prefix, self.dtype, self.sequences, self.size)

    @property
    def tokens(self) -> np.ndarray:
        return self._maps.tokens

    def read(self, start: int, stop: int) -> np.ndarray:
        """The tokens [start, stop). Raises OSError if they come from a store that cannot be read."""
        return self._maps.tokens[start:stop]

    def prefetch(self, start: int, stop: int) -> None:
        """Says that the tokens [start, stop) will be read soon. On the disk, they are there already."""

    @property
    def lengths(self) -> np.ndarray:
        return self._maps.lengths

    @property
    def pointers(self) -> np.ndarray:
        return self._maps.pointers

    @property
    def document_indices(self) -> np.ndarray:
        return self._maps.documents

    def document_starts(self, start: int, stop: int) -> list[int]:
        """The places in [start, stop) at which a document begins, rising. Reads a few numbers of the index."""
        size, pointers, documents = self._itemsize, self._maps.pointers_view, self._maps.documents_view
        first = bisect_left(pointers, start * size)
        near = min(first + NEAR, self.sequences)
        last = bisect_left(pointers, stop * size, first, near)
        if last == near:
            last = bisect_left(pointers, stop * size, near)
        if first == last:
            return []
        if documents[first:last].tolist() != list(range(first, last)):  # a document may have several sequences, or none
            low, high = (bisect_left(documents, sequence) for sequence in (first, last))
            return sorted({pointers[sequence] // size for sequence in documents[low:high]})
        places = [offset // size for offset in pointers[first:last].tolist()]
        return places if len(places) == 1 or len(set(places)) == len(places) else sorted(set(places))

    def document_at(self, place: int) -> tuple[int, int]:
        """The document of the token at `place`, and the token's index in it."""
        sequence = bisect_right(self._maps.pointers_view, place * self.dtype.itemsize) - 1
        document = bisect_right(self._maps.documents_view, sequence) - 1
        return document, place - self.document_start(document)

    def document_start(self, document: int) -> int:
        """The token at which a document begins. `document` may be one past the last: then the end of the last."""
        sequence = self._maps.documents_view[document]
        if sequence == self.sequences:
            return self.size
        return self._maps.pointers_view[sequence] // self.dtype.itemsize

    def document_lengths(self) -> np.ndarray:
        """The number of tokens of each document, int64 [documents]. Reads the whole index."""
        starts = np.append(self.pointers // self.dtype.itemsize, self.size)[self.document_indices]
        return np.diff(starts)

    def index_faults(self) -> list[str]:
        """Lists the faults inside the index. Reads all of it, in pieces, and no token."""
        name, faults = with_suffix(self.prefix, ".idx"), []
        end, negative, misplaced = 0, False, False
        for start in range(0, len(self.lengths), PIECE):
            lengths = self.lengths[start : start + PIECE].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(lengths)
            negative |= bool((lengths < 0).any())
            misplaced |= not np.array_equal(self.pointers[start : start + PIECE], ends - lengths)
            end = int(ends[-1])
        if negative:
            faults.append(f"{name}: a sequence has a negative length")
        if misplaced:
            faults.append(f"{name}: the offsets do not match the lengths")
        documents = self.document_indices
        falling = any((np.diff(documents[i : i + PIECE + 1]) < 0).any() for i in range(0, len(documents), PIECE))
        if documents[0] != 0 or documents[-1] != len(self.lengths) or falling:
            faults.append(f"{name}: the documents must rise from 0 to {len(self.lengths)} sequences")
        return faults


def with_suffix(prefix: Path, suffix: str) -> Path:
    """Appends a suffix to the prefix; unlike Path.with_suffix, keeps a dot in the prefix's name."""
    return prefix.with_name(prefix.name + suffix)


def read_header(path: Path) -> tuple[np.dtype, int, int]:
    """Reads dtype, sequences and documents of an `.idx` file, and checks them against its size."""
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
    """One token file in the manifest. Raises ValueError if the split is unknown or a hash is missing."""

    name: str  # its prefix, in the folder itself
    split: str  # one of SPLITS
    documents: int
    tokens: int
    text_bytes: int
    largest_id: int
    sha256: dict[str, str]  # by suffix

    def __post_init__(self) -> None:
        if Path(self.name).name != self.name:
            raise ValueError(f"name {self.name!r} must be a file in the folder itself")
        if self.split not in SPLITS:
            raise ValueError(f"{self.name}: split {self.split!r} must be one of {', '.join(SPLITS)}")
        if self.sha256.keys() != SUFFIXES:
            raise ValueError(f"{self.name}: sha256 must have .bin and .idx, not {', '.join(self.sha256) or 'none'}")

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """The size of each of its files in bytes, by suffix."""
        return {".bin": self.tokens * dtype.itemsize, ".idx": index_bytes(self.documents, self.documents)}


Typed = TypeVar("Typed", bound="TokenFileEntry | Manifest")


def typed(kind: type[Typed], values: dict[str, Any]) -> Typed:
    """Builds a `kind`. Raises KeyError if a value is missing, TypeError if one has another type than its field."""
    for field in fields(kind):
        expected: Any = get_origin(field.type) or field.type
        found = values[field.name]
        if not isinstance(found, expected):
            raise TypeError(f"{field.name} must be {expected.__name__}, not {type(found).__name__}")
    return kind(**{field.name: values[field.name] for field in fields(kind)})


@dataclass(frozen=True)
class Manifest:
    """The contents of a finished folder.

    Raises ValueError if it lists a file twice, TypeError if `config.clean` is not a dict.
    """

    format_version: int
    tokenizer_fingerprint: str
    vocab_size: int
    corpus: dict[str, Any]  # source of the documents, and how many were left out
    config: dict[str, Any]  # the other settings that determine the tokens
    files: tuple[TokenFileEntry, ...]

    def __post_init__(self) -> None:
        if twice := [name for name, times in Counter(entry.name for entry in self.files).items() if times > 1]:
            raise ValueError(f"{twice[0]} must be in files only once: its documents would be trained on twice")
        if not isinstance(self.config.get("clean", {}), dict):
            raise TypeError(f"config.clean must be dict, not {type(self.config['clean']).__name__}")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads the manifest. Raises DataError if it is missing, unreadable or of another version."""
        path = Path(folder) / MANIFEST_FILE
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            raise DataError(f"{folder} {no_token_files(Path(folder))}") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        return cls.parse(path, text)

    @classmethod
    def parse(cls, path: Path | str, text: bytes) -> "Manifest":
        """Reads the content of `path`. Raises DataError if it is not a manifest, or of another version."""
        try:
            refuse_pointer_text(path, text)
            content = json.loads(text)
            version = content["format_version"]
            if version != FORMAT_VERSION:
                raise DataError(f"{path}: format version {version}, but this program reads {FORMAT_VERSION}")
            files = tuple(typed(TokenFileEntry, entry) for entry in content["files"])
            return typed(cls, {**content, "files": files})
        except DataError:
            raise
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is not a manifest: {type(error).__name__} {headline(error)}") from error

    def save(self, folder: Path) -> None:
        with durable(Path(folder) / MANIFEST_FILE) as file:
            file.write(json.dumps(asdict(self), indent=2).encode() + b"\n")

    def split(self, name: str) -> tuple[TokenFileEntry, ...]:
        """The files of "train" or "val", in corpus order."""
        if name not in SPLITS:
            raise DataError(f"split {name!r} must be one of {', '.join(SPLITS)}")
        return tuple(entry for entry in self.files if entry.split == name)

    def summary(self, folder: Path) -> str:
        """Describes the folder in one line."""
        documents, tokens, text_bytes = self.totals()
        return (
            f"{folder}: {documents:,} documents, {tokens:,} tokens ({self.totals(['val'])[1]:,} for validation),"
            f" {text_bytes / 1e6:.1f} MB of text, {self.vocab_size:,} rows"
        )

    def totals(self, names: Iterable[str] = SPLITS) -> tuple[int, int, int]:
        """The documents, tokens and bytes of text in these splits."""
        chosen = [entry for name in names for entry in self.split(name)]
        return (
            sum(entry.documents for entry in chosen),
            sum(entry.tokens for entry in chosen),
            sum(entry.text_bytes for entry in chosen),
        )
