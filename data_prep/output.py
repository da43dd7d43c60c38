"""The output folder of a run: absent, unfinished or finished. Existing files are never overwritten.

During a run OUT/unfinished/ holds the settings, a lock and the units' records; it is removed once the manifest is
written. The lock allows one run at a time, or several parts of one run. The token files are safe without it: two
processes that write the same unit write the same bytes, under different temporary names.
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
QUARANTINE_FILE = "quarantine.jsonl"  # id and reason of each quarantined document


@dataclass(frozen=True)
class Output:
    """The output folder of a run, with the settings that determine its content."""

    folder: Path
    settings: dict[str, Any]  # `corpus` and `config`, as JSON
    tokenizer_from_corpus: bool  # True: a changed corpus means another tokenizer

    def finished(self) -> Manifest | None:
        """The manifest, if a run with these settings has finished; None if one may start or continue.

        Raises DataError if the folder has other content, or was damaged after it was finished.
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
        """Removes the leftovers of a run that was killed right after its manifest, unless another run does so now."""
        if self._unfinished.exists():
            with suppress(DataError, FileNotFoundError), exclusive(self._unfinished / LOCK_FILE, self._busy):
                shutil.rmtree(self._unfinished)

    @contextmanager
    def started(self) -> Iterator[None]:
        """Locks the folder for this run alone; first removes the partial files of a killed run.

        If the block fails before any unit is done, the folder is left as it was found.
        """
        self._unfinished.mkdir(parents=True, exist_ok=True)
        with exclusive(self._unfinished / LOCK_FILE, self._busy):
            if (self.folder / MANIFEST_FILE).exists():  # another run wrote it while this one made its tokenizer
                shutil.rmtree(self._unfinished)
                raise DataError(self._just_finished)
            self._remove_half_written()
            try:
                with durable(self._settings_path) as file:
                    file.write(json.dumps(self.settings, indent=2).encode())
                yield
            except BaseException:
                self._remove_half_written()  # files of the workers that were ended
                self._forget_if_empty()
                raise

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Locks the folder together with other parts of the same run. Raises DataError if it is not prepared.

        Removes nothing: a partial file may belong to another part.
        """
        if not self.prepared:
            raise DataError(f"out={self.folder} is not prepared for parts: run part=prepare first")
        with shared(self._unfinished / LOCK_FILE, self._busy):
            if (self.folder / MANIFEST_FILE).exists():
                raise DataError(self._just_finished)
            yield

    @property
    def prepared(self) -> bool:
        """True if the folder has what parts need: the settings and the tokenizer."""
        return self._settings_path.exists() and self.has_tokenizer

    @property
    def has_tokenizer(self) -> bool:
        return (self.folder / TOKENIZER_FOLDER / SPEC_FILE).exists()  # written last

    def finish(self, manifest: Manifest) -> None:
        """Removes token files that are not in the manifest (the corpus shrank after a crash), then writes it."""
        names = {entry.name for entry in manifest.files}
        for path in [*self.folder.glob("*.bin"), *self.folder.glob("*.idx")]:
            if path.stem not in names:
                path.unlink()
        for entry in manifest.files:
            for suffix in entry.sha256:
                assert with_suffix(self.folder / entry.name, suffix).exists()
        self._remove_half_written()  # files of workers that a document crashed
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
        """The settings with which an unfinished folder was begun.

        Each unit is compared with its input, so a corpus that has changed since (a repaired file) is accepted, unless
        the tokenizer was trained on it.
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
        return f"another run has just finished {self.folder}: run the same command again"

    @property
    def _unfinished(self) -> Path:
        return self.folder / UNFINISHED_FOLDER

    @property
    def _settings_path(self) -> Path:
        return self._unfinished / SETTINGS_FILE

    def _compare(self, saved: dict[str, Any]) -> None:
        difference = first_difference(saved, self.settings)
        if difference:
            for old, new in RENAMED.items():  # a folder has the names of when it was made
                difference = difference.replace(old, new)
            raise DataError(
                f"out={self.folder} was made with other settings: {difference};"
                " choose another out=, or delete it first; nothing was overwritten"
            )


def first_difference(before: Any, now: Any, key: str = "") -> str | None:
    """Describes the first key in which two trees of JSON differ; None if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            found = first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            if found:
                return found
        return None
    return None if before == now else f"{key} is {json.dumps(before)} there, {json.dumps(now)} now"
