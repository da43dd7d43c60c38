"""Finds and reads local and remote files: by name, glob, folder or URL, in pieces, decompressed on the way.

A piece is a range of a file: bytes of lines, row groups of parquet, or the whole file. A piece depends on the file
alone, and a process reads it without the others. Memory holds only the current row.
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
from data_prep.errors import DataError, headline, nearest
from data_prep.json_values import values_of

TEXT, LINES, VALUES, PARQUET = "text", "lines", "values", "parquet"  # the forms of a file
EXPANSION = 4  # estimated ratio of text to compressed bytes, for the size of units and the time left
BLOCK_BYTES = 1 << 20
REMOTE_BLOCK_BYTES = 8 << 20
HTTP_SECONDS = 60.0  # seconds within which a web server must send something
WEB = ("http://", "https://")


class Document(NamedTuple):
    """One document: an id that finds it again, its text, and the text's UTF-8."""

    id: str
    text: str
    data: bytes


class Rejected(NamedTuple):
    """A document that cannot be used, and the reason."""

    id: str
    reason: str


class Form(NamedTuple):
    """How a file is read."""

    kind: str = TEXT  # TEXT: one document; LINES and VALUES: rows of JSON (see json_values.py); PARQUET
    compression: str | None = None  # as in decompress.py; None: not compressed


PLAIN = Form()


@dataclass(frozen=True)
class Piece:
    """A range of a file."""

    path: str
    stamp: str  # changes when the file does
    size: int  # estimated bytes of text
    start: int = 0
    stop: int | None = None  # None: to the end
    splittable: bool = False  # may be cut at any byte, because its reader aligns to lines
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
    """A file that was found."""

    path: str
    size: int  # bytes; 0 if the server does not say
    stamp: str  # changes when the file does
    ranged: bool = True  # can be read from any byte

    def whole(self, form: Form = PLAIN) -> Piece:
        return Piece(self.path, self.stamp, self.size * (EXPANSION if form.compression else 1), form=form)

    def lines(self, form: Form) -> Piece:
        """The whole file as a piece, which may be cut if the file can be read from any byte."""
        return replace(self.whole(form), splittable=self.ranged and not form.compression)


def name_of(path: str) -> PurePosixPath:
    """The path of a file, or of a web address without its query (?download=true)."""
    return PurePosixPath(urlsplit(path).path if path.startswith(WEB) else path)


def compression_of(path: str) -> str | None:
    """The compression that the suffix names; None if it names none."""
    return BY_SUFFIX.get(name_of(path).suffix.lower())


def kind_of(path: str) -> str:
    """The suffix that names the content, without the suffix of a compression."""
    name = name_of(path)
    return (PurePosixPath(name.stem) if compression_of(path) else name).suffix.lower()


Choose = Callable[[str, list[FileInfo]], list[FileInfo]]


def everything(name: str, files: list[FileInfo]) -> list[FileInfo]:
    return files


def expand(paths: list[str], choose: Choose = everything) -> list[FileInfo]:
    """Lists the files of paths, globs, folders and URLs: in the given order, sorted within one item, each file once.

    `choose` selects among the files of one item. Local files count as the same if their real paths are. Raises
    DataError if a file cannot be opened.
    """
    found: dict[str, FileInfo] = {}
    for name in paths:
        matches = remote_files(name) if is_remote(name) else local_files(name)
        if not matches:
            raise DataError(f"corpus.paths: {name!r} {_nothing_in(name)}")
        for match in choose(name, matches):
            found.setdefault(match.path if is_remote(name) else os.path.realpath(match.path), match)
    if not found:
        raise DataError("corpus.paths=[] must name at least one file, glob, folder or URL")
    return list(found.values())


def _nothing_in(name: str) -> str:
    if os.path.isdir(name):
        return "is a folder without files"
    plain = not is_remote(name) and not glob.has_magic(name)
    return f"matches no file{nearest(Path(name), ': ') if plain else ''}"


def local_files(name: str) -> list[FileInfo]:
    with reading(name):
        if is_there(name):  # before the glob: a name may have brackets
            paths = named(name, ["**"]) if is_folder(name) else iter([name])
        else:
            paths = named("/" if name.startswith("/") else ".", name.split("/"))
        return [local_file(path) for path in sorted(set(map(Path, paths)))]


def local_file(path: Path) -> FileInfo:
    """Describes a local file. Raises DataError or OSError if it cannot be opened: now, not in the middle of a run."""
    status = path.stat()
    if not S_ISREG(status.st_mode):
        raise DataError(f"{path}: cannot be read: neither a file nor a folder")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: cannot be read: no permission")
    return FileInfo(path.as_posix(), status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


def named(folder: str, parts: list[str]) -> Iterator[str]:
    """Yields the files in `folder` that match a glob's parts. Raises OSError or DataError if a folder is unreadable."""
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
    """Yields the folder and all folders below, each once. Follows links, but prefers a path without a link."""
    waiting, links, seen = [folder], list[str](), set[str]()
    while waiting or links:
        folder = (waiting or links).pop()
        if (real := os.path.realpath(folder)) not in seen:
            seen.add(real)
            yield folder
            for below in filter(is_folder, entries(folder, "*")):
                (links if os.path.islink(below) else waiting).append(below)


def entries(folder: str, part: str) -> list[str]:
    """The entries that match one part of a glob; hidden ones only if the part begins with a dot."""
    if not glob.has_magic(part):
        return list(filter(is_there, [os.path.join(folder, part)]))
    names = sorted(fnmatch.filter(os.listdir(folder), part))
    return [os.path.join(folder, name) for name in names if part.startswith(".") or not name.startswith(".")]


def is_there(path: str) -> bool:
    """True if the path exists, even as a dangling link. Raises OSError if that cannot be determined."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: str) -> bool:
    """True if the path is a folder. Raises DataError if it is a dangling link."""
    try:
        return S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        raise DataError(f"{path}: cannot be read: it is a dangling link; repair or remove it") from None


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
    if info.get("size") is None:  # as in a web server's listing of a folder
        info = system.info(inner)
    version = next((info[key] for key in ("ETag", "etag", "LastModified", "mtime") if info.get(key)), "")
    path, size = system.unstrip_protocol(inner), info.get("size")  # None if the server does not say
    return FileInfo(path, size or 0, f"{size}-{version}", takes_ranges(path))


@cache
def takes_ranges(path: str) -> bool:
    """True if the file can be read from any byte. Tests it, because a web server's headers may be wrong."""
    if not path.startswith(WEB):
        return True
    system, inner = filesystem(path)
    try:
        with system.open(inner, "rb", block_size=1, cache_type="none") as file:
            file.seek(1)
            return bool(file.read(1))
    except ValueError:  # from fsspec: it cannot seek, or the answer is the whole file
        return False


def filesystem(name: str) -> tuple[Any, str]:
    """fsspec's file system, and the file's name in it. Raises DataError if a package is missing."""
    import fsspec

    try:
        system, inner = fsspec.core.url_to_fs(name, **(web_client() if name.startswith(WEB) else {}))
    except ImportError as error:
        missing = getattr(error.__cause__ or error, "name", None)
        raise DataError(f"{name}: needs a package that is not installed: pip install {missing or error}") from error
    return system, inner


def web_client() -> dict[str, Any]:
    """fsspec's options for the web: by default its client stops after five minutes per file, even while data comes."""
    from aiohttp import ClientTimeout

    return {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=HTTP_SECONDS, sock_read=HTTP_SECONDS)}}


def open_raw(path: str, block: int | None = None) -> BinaryIO:
    """Opens a file. block: bytes fetched at once from a remote file."""
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
    """Turns every error while reading the file into a DataError that names it."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # fsspec, Arrow and each protocol's client raise their own errors
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {headline(error)}") from error


def lines_of(
    piece: Piece, limit: int, largest: int, heartbeat: Callable[[], None]
) -> Iterator[tuple[int, int, bytes | BinaryIO]]:
    """Yields each line that begins in the piece, or each value of VALUES: its offset in the text, its size, its bytes.

    A line of more than `limit` bytes becomes a temporary file, because a compressed file can only be read again from
    its start. The temporary file holds a line of more than `largest` bytes only in part. `heartbeat` is called now and
    then during a long line.
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
                file = TemporaryFile()  # noqa: SIM115 - deleted when its last reader closes it
                file.write(line)
                for block in rest_of_line(stream, None, heartbeat):
                    size += len(block)
                    if size <= largest:
                        file.write(block)
                yield offset, size, cast(BinaryIO, file)
            offset += size


def rest_of_line(stream: io.BufferedReader, most: int | None, heartbeat: Callable[[], None]) -> Iterator[bytes]:
    """Yields the rest of the line, or at most `most` bytes of it."""
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
    """The whole file; None if it has more than `limit` bytes. It is then not read to its end."""
    with reading(path), opened(path, compression) as stream:
        data = stream.read(limit + 1)
    return data if len(data) <= limit else None


def blocks_of(path: str, compression: str | None = None) -> Iterator[bytes]:
    """The file's bytes, decompressed."""
    with reading(path), opened(path, compression) as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block
