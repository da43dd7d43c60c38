"""Documents out of three sources: the standard library, local files, a dataset of the Hugging Face hub.

A corpus is the dataclass of its own settings. Its documents come one at a time and always in the same order.
"""

import glob
import io
import json
import logging
import os
import platform
import sysconfig
import tokenize  # the standard library's
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from data_prep.errors import DataError, headline

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
ROWS_AT_ONCE = 1000


@dataclass
class CorpusConfig(ABC):
    """The group `corpus`: one subclass an option."""

    kind: ClassVar[str]

    @abstractmethod
    def documents(self, skipped: list[str]) -> Iterator[str]:
        """Every document that is not empty. Appends to `skipped` the names of those left out as unreadable.

        Raises DataError, naming the place, where the source cannot be read or a document is not UTF-8.
        """

    def text_bytes(self) -> int | None:
        """About how much text there is; None where only reading it would tell."""
        return None

    def describe(self) -> dict[str, Any]:
        """What the documents depend on, for the manifest."""
        return {"kind": self.kind, **asdict(self)}


@dataclass
class StdlibCorpus(CorpusConfig):
    """The running Python's own standard library, tests included: about 30 MB of source, and no network."""

    kind: ClassVar[str] = "stdlib"

    def documents(self, skipped: list[str]) -> Iterator[str]:
        root = Path(sysconfig.get_path("stdlib"))
        for path in self._paths():
            try:
                text = decode_source(path.read_bytes())
            except (SyntaxError, ValueError):  # an unknown coding, or not in it: test data, on purpose
                skipped.append(path.relative_to(root).as_posix())
                continue
            if text:
                yield text

    def text_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._paths())

    def describe(self) -> dict[str, Any]:
        root = Path(sysconfig.get_path("stdlib"))
        return {
            "kind": self.kind,
            "python": platform.python_version(),
            **listing((path.relative_to(root).as_posix(), path) for path in self._paths()),
        }

    @staticmethod
    def _paths() -> list[Path]:
        """All .py files, packages that pip put below the standard library left out."""
        root, paths = Path(sysconfig.get_path("stdlib")), []
        for folder, names, files in os.walk(root):
            names[:] = [name for name in names if name not in ("site-packages", "dist-packages")]
            paths += [Path(folder) / name for name in files if name.endswith(".py")]
        return sorted(path for path in paths if path.is_file())


@dataclass
class FilesCorpus(CorpusConfig):
    """Local files: a document a row of .jsonl and .parquet, a document a file for all others.

    `paths`: files, globs, and folders (all files below, hidden ones left out). `text_key`: the column of the
    text.
    """

    kind: ClassVar[str] = "files"
    paths: list[str]
    text_key: str = "text"

    def documents(self, skipped: list[str]) -> Iterator[str]:
        for path in expand(self.paths):
            if path.suffix in JSON_LINES:
                yield from filter(None, json_lines(path, self.text_key))
            elif path.suffix == PARQUET:
                yield from filter(None, parquet_rows(path, self.text_key))
            elif text := read_text(path):
                yield text

    def text_bytes(self) -> int | None:
        paths = expand(self.paths)
        if any(path.suffix == PARQUET for path in paths):
            return None  # compressed
        return sum(path.stat().st_size for path in paths)

    def describe(self) -> dict[str, Any]:
        files = listing((path.as_posix(), path) for path in expand(self.paths))
        return {"kind": self.kind, "paths": list(self.paths), "text_key": self.text_key, **files}


@dataclass
class HubCorpus(CorpusConfig):
    """A dataset of the Hugging Face hub, streamed: `name` and `config` as its page says."""

    kind: ClassVar[str] = "hub"
    name: str
    config: str | None = None
    split: str = "train"
    text_key: str = "text"
    revision: str | None = None

    def documents(self, skipped: list[str]) -> Iterator[str]:
        where = f"{self.name} ({self.config or 'default'}, {self.split})"
        arguments = {"path": self.name, "name": self.config, "split": self.split, "revision": self.revision}
        yield from filter(None, column(where, self.text_key, **arguments))


def decode_source(data: bytes) -> str:
    """Python source by its own declaration (PEP 263), line ends as they are. SyntaxError, ValueError."""
    coding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(coding)


def expand(paths: list[str]) -> list[Path]:
    """The files that paths, globs and folders name, each once, in the order given; sorted within one name."""
    found: dict[Path, None] = {}
    for name in paths:
        if os.path.isdir(name):
            below = sorted(path for path in Path(name).rglob("*") if path.is_file())
            matches = [p for p in below if not any(part.startswith(".") for part in p.relative_to(name).parts)]
        elif os.path.isfile(name):  # before the glob: a name may have brackets
            matches = [Path(name)]
        else:
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True) if os.path.isfile(match))
        if not matches:
            raise DataError(f"corpus.paths: {name!r} matches no file")
        found.update(dict.fromkeys(matches))
    if not found:
        raise DataError("corpus.paths=[] must name at least one file, glob or folder")
    return list(found)


def listing(files: Iterator[tuple[str, Path]]) -> dict[str, Any]:
    """Number, bytes and a digest of names and sizes: enough to see that a corpus has changed."""
    count, total, digest = 0, 0, sha256()
    for name, path in files:
        size = path.stat().st_size
        count, total = count + 1, total + size
        digest.update(f"{name}\0{size}\n".encode("utf-8", "surrogateescape"))
    return {"files": count, "bytes": total, "listing_sha256": digest.hexdigest()}


def read_text(path: Path) -> str:
    """One file, byte for byte. (`datasets` would turn every \\r\\n into \\n.)"""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


def json_lines(path: Path, text_key: str) -> Iterator[str]:
    """The rows' texts. Parsed line by line: Arrow's JSON reader turns texts like dates into dates."""
    lines = column(str(path), "text", path="text", data_files=data_files(path), split="train", keep_linebreaks=False)
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: a row must be an object, not {type(row).__name__}")
            yield text_of(row, text_key, f"{path}, line {number}")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise not_utf8(path) from error


def parquet_rows(path: Path, text_key: str) -> Iterator[str]:
    """The column of texts, and no other column."""
    from pyarrow import ArrowException, parquet

    try:
        names = parquet.read_schema(path).names
    except ArrowException as error:
        raise DataError(f"{path}: not a parquet file: {headline(error)}") from error
    if text_key not in names:
        raise DataError(f"{path}: no column {text_key!r} (corpus.text_key); it has {', '.join(names)}")
    yield from column(
        str(path), text_key, path="parquet", data_files=data_files(path), split="train", columns=[text_key]
    )


def data_files(path: Path) -> list[str]:
    return [glob.escape(str(path.resolve()))]


def column(where: str, text_key: str, **arguments: Any) -> Iterator[str]:
    """One column of a streamed dataset. What fails inside `datasets` becomes one line that names the place.

    UnicodeDecodeError from a text file passes, for the caller knows how to find the line.
    """
    number = 0
    try:
        stream = quiet_datasets().load_dataset(streaming=True, **arguments)
        for batch in stream.iter(batch_size=ROWS_AT_ONCE):
            if text_key not in batch:
                raise DataError(f"{where}: no column {text_key!r} (corpus.text_key); it has {', '.join(batch)}")
            for value in batch[text_key]:
                number += 1
                yield text_of({text_key: value}, text_key, f"{where}, row {number}")
    except DataError:
        raise
    except UnicodeDecodeError as error:
        if arguments["path"] == "text":
            raise
        raise DataError(f"{where}: a text after row {number} is not UTF-8") from error
    except Exception as error:  # datasets raises what each of its readers raises
        place = f"{where}, after row {number}" if number else where
        raise DataError(f"{place}: {type(error).__name__}: {headline(error)}") from error


def text_of(row: dict[str, Any], text_key: str, where: str) -> str:
    """The row's text. DataError where it has none, or half of a surrogate pair in it."""
    if text_key not in row:
        raise DataError(f"{where}: no key {text_key!r} (corpus.text_key); it has {', '.join(map(str, row))}")
    text = row[text_key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_key!r} must be text, not {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {text_key!r} is not UTF-8: half of a surrogate pair") from None
    return text


def not_utf8(path: Path) -> DataError:
    """The error for a file that is not UTF-8, with the first line that is not."""
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                return DataError(f"{path}, line {number}: not UTF-8 (byte 0x{byte:02x} at column {error.start + 1})")
    return DataError(f"{path}: not UTF-8")


def quiet_datasets() -> ModuleType:
    """The package `datasets`, imported when first needed, without torch, log lines and bars."""
    os.environ.setdefault("USE_TORCH", "0")  # else it imports torch, seconds and hundreds of MB, for nothing
    import datasets
    import huggingface_hub

    huggingface_hub.logging.set_verbosity(logging.CRITICAL)
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors come as exceptions too
    datasets.disable_progress_bars()
    return datasets
