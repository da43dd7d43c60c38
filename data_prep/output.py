"""The output folder of a run: absent, unfinished, or finished. Nothing that is in it is ever overwritten.

While a run is under way, OUT/unfinished/ holds its settings, a lock and the units' records; when the manifest
is written, it goes away. The lock keeps runs from getting in each other's way, parts of one run excepted. The
files need it not: two that write the same unit write the same bytes, each under a temporary name of its own.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.corpus import LISTING_KEYS
from data_prep.durable import TEMPORARY_MARK, durable, exclusive, shared, sync_folder
from data_prep.encode import UNFINISHED_FOLDER
from data_prep.errors import DataError
from data_prep.faults import check
from data_prep.renamed import RENAMED
from data_prep.token_file import MANIFEST_FILE, TOKENIZER_FOLDER, Manifest, with_suffix
from data_prep.tokenizer_spec import SPEC_FILE

SETTINGS_FILE = "settings.json"
LOCK_FILE = "lock"
QUARANTINE_FILE = "quarantine.jsonl"  # id and reason of each document that was put aside


@dataclass(frozen=True)
class Output:
    """`folder`, and the settings that its content follows from: `corpus` and `config`, as JSON."""

    folder: Path
    settings: dict[str, Any]
    tokenizer_from_corpus: bool  # then a folder that was begun with another corpus has another tokenizer

    def finished(self) -> Manifest | None:
        """The manifest if a run with these settings has finished; None if one may start or go on.

        Raises DataError if the folder has something else in it, or was finished and then damaged.
        """
        if (self.folder / MANIFEST_FILE).exists():
            manifest = check(self.folder)
            corpus = {key: manifest.corpus.get(key) for key in self.settings["corpus"]}
            self._compare({"corpus": corpus, "config": manifest.config})
            self._tidy()
            return manifest
        if self.folder.exists() and not self.folder.is_dir():
            raise DataError(f"out={self.folder} must be a folder")
        if self._settings_path.exists():
            self._compare(self._settings_there())
        elif self.folder.exists() and any(path != self._unfinished for path in self.folder.iterdir()):
            raise DataError(f"out={self.folder} has other files in it; choose another out=, nothing was overwritten")
        return None

    def _tidy(self) -> None:
        """Remove what a run leaves that is killed right after its manifest; not from under one that removes it now."""
        if self._unfinished.exists():
            with suppress(DataError, FileNotFoundError), exclusive(self._unfinished / LOCK_FILE, self._busy):
                shutil.rmtree(self._unfinished)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Hold the folder for this run alone; what a killed run left half written is removed first.

        When the block fails before any unit is done, the folder is left as it was found.
        """
        self._unfinished.mkdir(parents=True, exist_ok=True)
        with exclusive(self._unfinished / LOCK_FILE, self._busy):
            if (self.folder / MANIFEST_FILE).exists():  # it came while this run made its tokenizer
                shutil.rmtree(self._unfinished)
                raise DataError(self._just_finished)
            self._remove_half_written()
            try:
                with durable(self._settings_path) as file:
                    file.write(json.dumps(self.settings, indent=2).encode())
                yield
            except BaseException:
                self._remove_half_written()  # of workers that have been ended
                self._forget_if_empty()
                raise

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Holds the folder beside other parts of the same run. Raises DataError if it is not prepared for them.

        Removes nothing: what is half written here may be another part's.
        """
        if not self.prepared:
            raise DataError(f"out={self.folder} is not prepared for parts: part=prepare comes first")
        with shared(self._unfinished / LOCK_FILE, self._busy):
            if (self.folder / MANIFEST_FILE).exists():
                raise DataError(self._just_finished)
            yield

    @property
    def prepared(self) -> bool:
        """True if all that parts need is there: the settings and the tokenizer."""
        return self._settings_path.exists() and self.has_tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / TOKENIZER_FOLDER / SPEC_FILE).exists()  # written last

    def finish(self, manifest: Manifest) -> None:
        """Remove token files that are not the manifest's (the corpus shrank after a crash), then write it."""
        names = {entry.name for entry in manifest.files}
        for path in [*self.folder.glob("*.bin"), *self.folder.glob("*.idx")]:
            if path.stem not in names:
                path.unlink()
        for entry in manifest.files:
            for suffix in entry.sha256:
                assert with_suffix(self.folder / entry.name, suffix).exists()
        self._remove_half_written()  # of workers that a document has crashed
        sync_folder(self.folder)
        manifest.save(self.folder)
        shutil.rmtree(self._unfinished)

    def _remove_half_written(self) -> None:
        for path in self.folder.rglob(f"*{TEMPORARY_MARK}*"):
            path.unlink()

    def _forget_if_empty(self) -> None:
        if any(self.folder.glob("*.bin")) or (self.folder / MANIFEST_FILE).exists():
            return
        shutil.rmtree(self._unfinished)
        shutil.rmtree(self.folder / TOKENIZER_FOLDER, ignore_errors=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _settings_there(self) -> dict[str, Any]:
        """The settings that an unfinished folder was begun with.

        Its units are checked against their texts one by one, so a corpus that has changed since (a mended
        file) is no obstacle, unless the tokenizer was made from it.
        """
        try:
            saved = dict(json.loads(self._settings_path.read_bytes()))
        except ValueError as error:
            raise DataError(f"{self._settings_path} is not JSON; delete {self.folder}") from error
        if self.tokenizer_from_corpus:
            return saved
        listed = {key: value for key, value in self.settings["corpus"].items() if key in LISTING_KEYS}
        return {**saved, "corpus": {**saved["corpus"], **listed}}

    @property
    def _busy(self) -> str:
        return f"another run is writing to {self.folder}"

    @property
    def _just_finished(self) -> str:
        return f"another run has just finished {self.folder}: give the same command again"

    @property
    def _unfinished(self) -> Path:
        return self.folder / UNFINISHED_FOLDER

    @property
    def _settings_path(self) -> Path:
        return self._unfinished / SETTINGS_FILE

    def _compare(self, saved: dict[str, Any]) -> None:
        difference = first_difference(saved, self.settings)
        if difference:
            for old, new in RENAMED.items():  # folders keep the names of their time
                difference = difference.replace(old, new)
            raise DataError(
                f"out={self.folder} was made with other settings: {difference};"
                " choose another out=, or delete it first; nothing was overwritten"
            )


def first_difference(before: Any, now: Any, key: str = "") -> str | None:
    """Say in which key two trees of JSON differ first, and how; None where they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            found = first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if before == now else f"{key} is {json.dumps(before)} there, {json.dumps(now)} now"
