"""Rewrites a finished unit without the documents that an earlier unit or another folder also has."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.clean import digest_of
from data_prep.encode import EncodeJob, UnitRecord, Watch, dropped_path, entry_of, save_record, watched
from data_prep.encoder import Encoder
from data_prep.token_file import PIECE, SPLITS, TokenFile, TokenFileEntry, TokenFileWriter, with_suffix
from data_prep.unit import WorkUnit


@dataclass(frozen=True)
class DropCopies:
    """A task: rewrites a unit's files without the documents at `places` (as in `clean.KEPT`). The files must still
    hold all of them.
    """

    unit: WorkUnit
    record: UnitRecord
    places: np.ndarray

    def run(self, job: EncodeJob, encoder: Encoder, watch: Watch) -> UnitRecord:
        """Writes the files, then the new record: files that match no record are encoded again from the corpus."""
        record, files = self.record, list[TokenFileEntry]()
        for entry in record.files:
            chosen = self.places[self.places % 2 == SPLITS.index(entry.split)] // 2
            files += self._rewrite(job.folder, entry, chosen, encoder, watch) if len(chosen) else [entry]
        duplicates, dropped = record.duplicates + len(self.places), digest_of_places(self.places)
        record = replace(record, files=tuple(files), duplicates=duplicates, dropped=dropped)
        save_record(dropped_path(job.folder, record.index), record, encoder.vocab_size)
        return record

    @staticmethod
    def _rewrite(
        folder: Path, entry: TokenFileEntry, chosen: np.ndarray, encoder: Encoder, watch: Watch
    ) -> list[TokenFileEntry]:
        path = folder / entry.name
        file = TokenFile(path)
        if len(chosen) == entry.documents:
            for suffix in entry.sha256:
                with_suffix(path, suffix).unlink()
            return []
        dropped, text_bytes = np.zeros(entry.documents, bool), entry.text_bytes
        dropped[chosen] = True
        with TokenFileWriter(path, encoder.vocab_size) as writer:
            for number, ids, ends in watched(pieces_of(file), watch):
                if dropped[number]:
                    text_bytes -= int(encoder.bytes_of_ids[ids].sum())
                else:
                    writer.write(ids, ends)
        return [entry_of(entry.split, writer, text_bytes)]


def pieces_of(file: TokenFile) -> Iterator[tuple[int, np.ndarray, list[int]]]:
    """Yields pieces of at most PIECE ids: the document's number, the ids, and the ends for `TokenFileWriter.write`.

    Reads the file, not its memory map, because each mapped page would stay in memory.
    """
    with open(with_suffix(file.prefix, ".bin"), "rb") as tokens:
        for number, length in enumerate(map(int, file.lengths)):
            for left in range(length, 0, -PIECE):
                ids = np.frombuffer(tokens.read(min(left, PIECE) * file.dtype.itemsize), file.dtype)
                yield number, ids, [left] if left <= PIECE else []


def digest_of_places(places: np.ndarray) -> str:
    return digest_of(np.sort(places).astype("<u4").tobytes()).hex() if len(places) else ""
