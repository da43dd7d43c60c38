"""Decides which documents are kept: limits of size, and exact duplicates within a run and against other folders.

Each unit drops its own duplicates and saves the sorted digests of the documents that it keeps. When all units are
done, equal digests are found range by range, and the units that hold a later copy are rewritten without it. The first
copy in the order of the corpus stays, whatever the number of workers, parts or crashes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.durable import DurableFile, publish, sha256_of
from data_prep.errors import DataError
from data_prep.token_file import MANIFEST_FILE, PIECE, SPLITS, Manifest

DIGEST_BYTES = 16
DIGESTS_FILE = "documents.digests"  # in a finished folder: 16 bytes per document, sorted
DIGESTS_SHA256 = "digests_sha256"  # key of its hash in the manifest's `corpus`; old manifests lack it
# Digests of a unit: place = 2 · document + split. Aligned, because a search in an unaligned column copies it.
KEPT = np.dtype([("high", "<u8"), ("low", "<u8"), ("place", "<u4")], align=True)
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
RANGE_BYTES = 1 << 28  # bytes of digests that are compared at once
NOWHERE = -1  # the place of a document that the tokenizer fails on


@dataclass
class CleanConfig:
    """The keys `clean.*`."""

    min_bytes: int = 1  # bytes of text; shorter documents are left out
    max_bytes: int | None = None  # bytes of text; longer documents are left out; null: no limit
    deduplicate: bool = False  # keep only the first of documents with the same text
    exclude: list[str] = field(default_factory=list)  # finished folders whose documents are left out here

    def __post_init__(self) -> None:
        if self.min_bytes < 1:
            raise DataError(f"clean.min_bytes={self.min_bytes} must be at least 1: empty documents are left out")
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise DataError(f"clean.max_bytes={self.max_bytes} must be at least clean.min_bytes={self.min_bytes}")
        if self.exclude and not self.deduplicate:
            raise DataError("clean.exclude= needs clean.deduplicate=true")

    def describe(self) -> dict[str, Any]:
        """The settings for the manifest. `exclude` has its old name there, and names folders by their content."""
        settings = asdict(self)
        return settings | {"unlike": [sha256_of(digests_of(name)) for name in settings.pop("exclude")]}


def digests_of(folder: str) -> Path:
    """The folder's file of digests. Raises DataError if the folder is unfinished or was made without deduplication."""
    path = Path(folder) / DIGESTS_FILE
    if not path.is_file() or not (Path(folder) / MANIFEST_FILE).is_file():
        raise DataError(f"clean.exclude: {folder} has no {DIGESTS_FILE}: make it with clean.deduplicate=true first")
    if path.stat().st_size % DIGEST.itemsize:
        raise DataError(f"clean.exclude: {path}: {path.stat().st_size} bytes are not 16 per document: see verify=")
    return path


def digest_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yields the faults of a folder's digests, if the manifest says that it has any."""
    if not manifest.config.get("clean", {}).get("deduplicate"):
        return
    path, documents = folder / DIGESTS_FILE, manifest.totals()[0]
    if not path.is_file():
        yield f"{path} is missing"
    elif (size := path.stat().st_size) != documents * DIGEST.itemsize:
        yield f"{path}: {size} bytes, but the {documents} documents of the manifest have 16 each"
    else:
        table = np.memmap(path, DIGEST, mode="r") if size else np.empty(0, DIGEST)
        if any(not rises(table[start : start + PIECE + 1]) for start in range(0, documents, PIECE)):
            yield f"{path}: the digests are not sorted"
        elif manifest.corpus.get(DIGESTS_SHA256, found := sha256_of(path)) != found:
            yield f"{path}: its sha256 does not match the manifest"


def rises(table: np.ndarray) -> bool:
    high, low = table["high"], table["low"]
    return bool(((high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] > low[:-1]))).all())


def digest_of(data: bytes) -> bytes:
    return blake2b(data, digest_size=DIGEST_BYTES).digest()


def split_of(digest: bytes, val_fraction: float) -> str:
    """The split of a document. It follows from the document's text alone, so adding or removing others keeps it."""
    return "val" if int.from_bytes(digest[:8]) < val_fraction * 2**64 else "train"


def place_of(split: str, number: int) -> int:
    """The place of a document in its unit, given its number in the split's file."""
    return 2 * number + SPLITS.index(split)


def sorted_digests(places: dict[bytes, int]) -> np.ndarray:
    """The table of the documents that a unit keeps, sorted by digest."""
    numbers = np.fromiter(places.values(), np.int64, len(places))
    kept = numbers != NOWHERE
    halves = np.frombuffer(b"".join(places), dtype=">u8").reshape(-1, 2)[kept]
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    table = np.zeros(len(halves), KEPT)
    table["high"], table["low"], table["place"] = halves[order, 0], halves[order, 1], numbers[kept][order]
    return table


def find_duplicates(units: list[Path], unlike: list[Path], out: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields, for each range of digests, the later copies: the unit's index in the list, and the place in the unit.

    Writes the remaining digests to `out`, sorted. Memory: 256 MiB for a range, and what the caller keeps of the
    results. Disk: 24 bytes per document in the units' files, and 16 in `out`.
    """
    total = sum(path.stat().st_size // KEPT.itemsize for path in units)
    total += sum(path.stat().st_size // DIGEST.itemsize for path in unlike)
    ranges = total * 2 * KEPT.itemsize // RANGE_BYTES + 1
    bounds = [2**64 * i // ranges for i in range(ranges + 1)]
    file = DurableFile(out)
    try:
        for low, high in itertools.pairwise(bounds):
            digests, unit_numbers, places = gathered(units, unlike, low, high)
            order = np.lexsort((unit_numbers, digests["low"], digests["high"]))  # other folders first: unit -1
            digests, unit_numbers, places = digests[order], unit_numbers[order], places[order]
            later = np.zeros(len(digests), bool)
            later[1:] = digests[1:] == digests[:-1]
            file.write(np.ascontiguousarray(digests[~later & (unit_numbers >= 0)]).view(np.uint8).data)
            later &= unit_numbers >= 0
            yield unit_numbers[later], places[later]
        publish([file])
    finally:
        file.discard()


def gathered(units: list[Path], unlike: list[Path], low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads the digests in [low, high), with the unit of each and its place in the unit."""
    digests, numbers, places = [np.empty(0, DIGEST)], [np.empty(0, np.int32)], [np.empty(0, np.uint32)]
    for number, path, dtype in [*((-1, path, DIGEST) for path in unlike), *((i, p, KEPT) for i, p in enumerate(units))]:
        if path.stat().st_size == 0:
            continue
        table = np.memmap(path, dtype, mode="r")
        first = np.searchsorted(table["high"], np.uint64(low))
        last = len(table) if high == 2**64 else np.searchsorted(table["high"], np.uint64(high))
        part = np.array(table[first:last])
        found = np.empty(len(part), DIGEST)
        found["high"], found["low"] = part["high"], part["low"]
        digests.append(found)
        numbers.append(np.full(len(part), number, np.int32))
        places.append(part["place"] if dtype is KEPT else np.zeros(len(part), np.uint32))
    return np.concatenate(digests), np.concatenate(numbers), np.concatenate(places)
