"""Files to read, wherever they are: found by name, glob, folder or URL, read in pieces, decompressed on the way.

A piece is a range of a file: bytes of lines, row groups of parquet, or the whole file. What a piece holds follows
from the file alone, and one process reads it without the others. Nothing is held but the row that is being read.
"""

import fnmatch
import glob
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from stat import S_ISDIR, S_ISREG
from tempfile import TemporaryFile
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import urlsplit

from data_prep.decompress import BY_SUFFIX, decompressed
from data_prep.errors import DataError, headline
from data_prep.json_values import values_of

TEXT, LINES, VALUES, PARQUET = "text", "lines", "values", "parquet"  # the forms of a file
EXPANSION = 4  # of compressed text, about: for the size of the units and the time left
BLOCK_BYTES = 1 << 20
REMOTE_BLOCK_BYTES = 8 << 20
HTTP_SECONDS = 60.0  # in which a web server must send something
WEB = ("http://", "https://")


class Document(NamedTuple):
    """One text, with a name that finds it again, and its UTF-8."""

    id: str
    text: str
    data: bytes


class Rejected(NamedTuple):
    """A document that cannot be used, and why."""

    id: str
    reason: str


class Form(NamedTuple):
    """How a file is read. `kind`: one document (TEXT), rows of JSON (LINES, VALUES: see json_values), or PARQUET."""

    kind: str = TEXT
    compression: str | None = None


PLAIN = Form()


@dataclass(frozen=True)
class Piece:
    """A range of a file. `stop`: None to the end; `size`: bytes of text, about; `stamp` changes with the file."""

    path: str
    stamp: str
    size: int
    start: int = 0
    stop: int | None = None
    splittable: bool = False  # at any byte: its reader aligns to lines
    form: Form = PLAIN

    def cut(self, size: int) -> tuple["Piece", "Piece"]:
        middle = self.start + size
        return replace(self, size=size, stop=middle), replace(self, size=self.size - size, start=middle)

    def joins(self, other: "Piece") -> bool:
        """True if `other` begins where this one ends."""
        return self.path == other.path and self.stop == other.start

    def join(self, other: "Piece") -> "Piece":
        return replace(self, size=self.size + other.size, stop=other.stop)


class FileInfo(NamedTuple):
    """`stamp`: changes when the file does. `ranged`: whether it can be read from anywhere."""

    path: str
    size: int
    stamp: str
    ranged: bool = True

    def whole(self, form: Form = PLAIN) -> Piece:
        return Piece(self.path, self.stamp, self.size * (EXPANSION if form.compression else 1), form=form)

    def lines(self, form: Form) -> Piece:
        """The whole file, to be cut anywhere if it can be read from anywhere."""
        return replace(self.whole(form), splittable=self.ranged and not form.compression)


def name_of(path: str) -> PurePosixPath:
    """The path, or that of a web address, which may go on: ?download=true"""
    return PurePosixPath(urlsplit(path).path if path.startswith(WEB) else path)


def compression_of(path: str) -> str | None:
    """Compression according to the suffix of its name; None if there is none."""
    return BY_SUFFIX.get(name_of(path).suffix.lower())


def kind_of(path: str) -> str:
    """The suffix that says what is inside, compression left out."""
    name = name_of(path)
    return (PurePosixPath(name.stem) if compression_of(path) else name).suffix.lower()


Choose = Callable[[str, list[FileInfo]], list[FileInfo]]


def everything(name: str, files: list[FileInfo]) -> list[FileInfo]:
    return files


def expand(paths: list[str], choose: Choose = everything) -> list[FileInfo]:
    """The files that paths, globs, folders and URLs name, in the order given, sorted within one name.

    `choose` has the last word on those of one name. Each once: a local one by its real path. DataError for what they
    name and cannot be opened.
    """
    found: dict[str, FileInfo] = {}
    for name in paths:
        matches = remote_files(name) if is_remote(name) else local_files(name)
        if not matches:
            raise DataError(f"corpus.paths: {name!r} matches no file")
        for match in choose(name, matches):
            found.setdefault(match.path if is_remote(name) else os.path.realpath(match.path), match)
    if not found:
        raise DataError("corpus.paths=[] must name at least one file, glob, folder or URL")
    return list(found.values())


def local_files(name: str) -> list[FileInfo]:
    with reading(name):
        if is_there(name):  # before the glob: a name may have brackets
            paths = named(name, ["**"]) if is_folder(name) else iter([name])
        else:
            paths = named("/" if name.startswith("/") else ".", name.split("/"))
        return [local_file(path) for path in sorted(set(map(Path, paths)))]


def local_file(path: Path) -> FileInfo:
    """Raises DataError or OSError if it cannot be opened: now, and not in the middle of a run."""
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise DataError(f"{path}: cannot be read: neither a file nor a folder")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read: no permission")
    return FileInfo(path.as_posix(), status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def named(folder: str, parts: list[str]) -> Iterator[str]:
    """Yields what a glob's parts name in `folder`, without folders. Raises OSError or DataError if it cannot look."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        for below in folders(folder):
            yield from named(below, rest or ["*"])
        return
    for path in entries(folder, part):
        if rest and is_folder(path):
            yield from named(path, rest)
        elif not rest and not is_folder(path):
            yield path


def folders(folder: str) -> Iterator[str]:
    """The folder and all below, through links too, each once, for a link may lead back: without a link if it can be."""
    waiting, links, seen = [folder], list[str](), set[str]()
    while waiting or links:
        folder = (waiting or links).pop()
        if (real := os.path.realpath(folder)) not in seen:
            seen.add(real)
            yield folder
            for below in filter(is_folder, entries(folder, "*")):
                (links if os.path.islink(below) else waiting).append(below)


def entries(folder: str, part: str) -> list[str]:
    """Those that one part of a glob names. Hidden ones only where it begins with a dot."""
    if not glob.has_magic(part):
        return list(filter(is_there, [os.path.join(folder, part)]))
    names = sorted(fnmatch.filter(os.listdir(folder), part))
    return [os.path.join(folder, name) for name in names if part.startswith(".") or not name.startswith(".")]


def is_there(path: str) -> bool:
    """True if it exists, perhaps as a link that leads nowhere. Raises OSError if that cannot be known."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: str) -> bool:
    """DataError for a link that leads nowhere."""
    try:
        return S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        raise DataError(f"{path}: cannot be read: it links to what is not there; mend it, or take it away") from None


def is_remote(name: str) -> bool:
    return "://" in name


def remote_files(name: str) -> list[FileInfo]:
    with reading(name):
        system, inner = filesystem(name)
        if system.isfile(inner):
            matches = {inner: system.info(inner)}
        elif "*" in inner or "[" in inner:
            matches = system.glob(inner, detail=True)
        else:
            matches = system.find(inner, detail=True)
        files = [(path, info) for path, info in sorted(matches.items()) if info.get("type", "file") == "file"]
        return [remote_file(system, path, info) for path, info in files]


def remote_file(system: Any, inner: str, info: dict[str, Any]) -> FileInfo:
    if info.get("size") is None:  # as in a web server's list of a folder
        info = system.info(inner)
    version = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), "")
    path, size = system.unstrip_protocol(inner), info.get("size")  # None where a server does not say it
    return FileInfo(path, size or 0, f"{size}-{version}", takes_ranges(path))


@cache
def takes_ranges(path: str) -> bool:
    """True if the file can be read from anywhere: tried, for a web server may send all or nothing, whatever it says."""
    if not path.startswith(WEB):
        return True
    system, inner = filesystem(path)
    try:
        with system.open(inner, "rb", block_size=1, cache_type="none") as file:
            file.seek(1)
            return bool(file.read(1))
    except ValueError:  # fsspec's, of the seek or of an answer that is the whole file
        return False


def filesystem(name: str) -> tuple[Any, str]:
    """fsspec's file system, and the name in it. Raises DataError if a package is missing."""
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(name, **(web_client() if name.startswith(WEB) else {}))
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None)
        raise DataError(f"{name}: needs a package that is not installed: pip install {missing or error}") from error
    return system, inner


def web_client() -> dict[str, Any]:
    """fsspec's options. Left alone, its client gives a whole file five minutes, however steadily it comes."""
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=HTTP_SECONDS, sock_read=HTTP_SECONDS)}}


def open_raw(path: str, block: int | None = None) -> BinaryIO:
    """`block`: bytes that are fetched at once from far away."""
    if not is_remote(path):
        return open(path, "rb", buffering=0)
    system, inner = filesystem(path)
    block = (block or REMOTE_BLOCK_BYTES) if takes_ranges(path) else 0  # 0: a stream
    return cast(BinaryIO, system.open(inner, "rb", block_size=block))


@contextmanager
def opened(path: str, compression: str | None = None, block: int | None = None) -> Iterator[io.BufferedReader]:
    """The file's bytes, decompressed."""
    with open_raw(path, block) as raw:
        if compression is None:
            yield io.BufferedReader(cast(io.RawIOBase, raw), block or BLOCK_BYTES)
        else:
            with decompressed(raw, compression) as stream:
                yield io.BufferedReader(stream, block or BLOCK_BYTES)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Whatever goes wrong with the file is a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # fsspec, Arrow and each protocol's client raise what they like
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {headline(error)}") from error


def lines_of(
    piece: Piece, limit: int, largest: int, heartbeat: Callable[[], None]
) -> Iterator[tuple[int, int, bytes | BinaryIO]]:
    """Each line that begins in the piece, or each value of VALUES: its offset in the text, its size, its bytes.

    A line of more than `limit` bytes is a temporary file, for a compressed one could only be found again from the
    start; one of more than `largest` is not whole in it. `heartbeat` is called now and then within a long line.
    """
    with reading(piece.path), opened(piece.path, piece.form.compression) as stream:
        if piece.form.kind == VALUES:
            yield from values_of(watched_blocks(stream, heartbeat), limit, largest)
            return
        offset = piece.start
        if piece.start:
            assert piece.stop is None or piece.stop > piece.start
            stream.seek(piece.start - 1)
            most = None if piece.stop is None else piece.stop - piece.start + 1
            offset += sum(map(len, rest_of_line(stream, most, heartbeat))) - 1
        while piece.stop is None or offset < piece.stop:
            line = stream.readline(limit + 1)
            if not line:
                return
            size = len(line)
            if size <= limit or line.endswith(b"\n"):
                yield offset, size, line
            else:
                file = TemporaryFile()  # noqa: SIM115 - gone with the last who reads it
                file.write(line)
                for block in rest_of_line(stream, None, heartbeat):
                    size += len(block)
                    if size <= largest:
                        file.write(block)
                yield offset, size, cast(BinaryIO, file)
            offset += size


def rest_of_line(stream: io.BufferedReader, most: int | None, heartbeat: Callable[[], None]) -> Iterator[bytes]:
    """Yields what comes up to the end of the line, or `most` bytes of it."""
    while most != 0:
        heartbeat()
        block = stream.readline(BLOCK_BYTES if most is None else min(BLOCK_BYTES, most))
        yield block
        most = None if most is None else most - len(block)
        if not block or block.endswith(b"\n"):
            return


def watched_blocks(stream: io.BufferedReader, heartbeat: Callable[[], None]) -> Iterator[bytes]:
    while block := stream.read(BLOCK_BYTES):
        heartbeat()
        yield block


def bytes_of(path: str, limit: int, compression: str | None = None) -> bytes | None:
    """The whole file; None if more than `limit`, which is not read to its end."""
    with reading(path), opened(path, compression) as stream:
        data = stream.read(limit + 1)
    return data if len(data) <= limit else None


def blocks_of(path: str, compression: str | None = None) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    with reading(path), opened(path, compression) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block
