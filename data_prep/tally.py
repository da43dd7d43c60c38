"""Collects the finished units of a run: quarantined documents, and in the end the manifest."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.clean import DIGESTS_FILE, DIGESTS_SHA256, digest_of
from data_prep.durable import durable, sha256_of
from data_prep.encode import UnitRecord
from data_prep.errors import DataError
from data_prep.token_file import FORMAT_VERSION, Manifest
from data_prep.tokenizer import Tokenizer

NAMES_SHOWN = 3


@dataclass
class Tally:
    """The records of the units that are finished."""

    most_quarantined: int
    records: dict[int, UnitRecord] = field(default_factory=dict)
    quarantined: list[tuple[str, str]] = field(default_factory=list)

    def add(self, record: UnitRecord) -> None:
        """Adds a unit's record. Raises DataError if too many documents are quarantined."""
        self.records[record.index] = record
        self.quarantined += record.quarantined
        if len(self.quarantined) > self.most_quarantined:
            raise DataError(
                f"{len(self.quarantined):,} documents are quarantined, more than"
                f" max_quarantined={self.most_quarantined}: {shown(self.quarantined)}"
            )

    @property
    def in_order(self) -> list[UnitRecord]:
        return [self.records[index] for index in sorted(self.records)]

    def manifest(self, tokenizer: Tokenizer, settings: dict[str, Any], folder: Path) -> Manifest:
        """The manifest of the finished `folder`."""
        records = self.in_order
        entries = [entry for record in records for entry in record.files]
        counts = {
            key: sum(getattr(record, key) for record in records) for key in ("too_short", "too_long", "duplicates")
        }
        corpus = {
            **settings["corpus"],
            "digest": digest_of("".join(record.digest for record in records).encode()).hex(),
            "quarantined": len(self.quarantined),
            **counts,
        }
        if settings["config"]["clean"]["deduplicate"]:
            corpus[DIGESTS_SHA256] = sha256_of(folder / DIGESTS_FILE)
        files = tuple(sorted(entries, key=lambda entry: entry.split))  # stable: train, then val, in corpus order
        return Manifest(FORMAT_VERSION, tokenizer.fingerprint, tokenizer.vocab_size, corpus, settings["config"], files)

    def rate(self, seconds: float) -> str:
        """The MB/s for the end of a report; "" if all units were finished before."""
        megabytes = sum(record.text_bytes for record in self.records.values() if not record.kept) / 1e6
        return f", {megabytes / seconds:.1f} MB/s" if megabytes else ""


def shown(quarantined: list[tuple[str, str]]) -> str:
    """The first few quarantined documents, for one line."""
    names = "; ".join(f"{name}: {reason}" for name, reason in quarantined[:NAMES_SHOWN])
    return names + ("; ..." if len(quarantined) > NAMES_SHOWN else "")


def save_quarantine(path: Path, tally: Tally) -> None:
    """Writes one object per line, in corpus order; no file if no document is quarantined."""
    if not tally.quarantined:
        path.unlink(missing_ok=True)  # from a killed run, before the corpus was repaired
        return
    with durable(path) as file:
        for record in tally.in_order:
            for name, reason in record.quarantined:
                file.write(
                    json.dumps({"id": name, "reason": reason}, ensure_ascii=False).encode("utf-8", "backslashreplace")
                    + b"\n"
                )
